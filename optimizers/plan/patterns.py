"""Lists of (regex, value) matched against parameter paths: first match wins, every path must be covered."""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax

Value = TypeVar("Value")
Rules = Sequence[tuple[str, Value]]


def path_name(key_path: tuple[Any, ...]) -> str:
    """Join a JAX key path with slashes: `decoder/layers/attention/query/kernel`."""
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in key_path)


def paths(tree: Any) -> list[str]:
    """Paths of all leaves, in the order of `jax.tree.leaves`."""
    return [path_name(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def state_key(path: str) -> str:
    """A path as one key of an optimizer's state: checkpoints keep slashes for their own nesting."""
    return path.replace("/", ".")


def first_match(rules: Rules[Value], path: str) -> Value:
    """The value of the first rule whose regex matches the whole path.

    Raises:
      ValueError: no rule matches; the message names the path and the patterns.
    """
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    tried = ", ".join(repr(pattern) for pattern, _ in rules)
    raise ValueError(f"parameter {path!r} is matched by none of {tried}; end the list with ('.*', value)")


def path_tree(tree: Any) -> Any:
    """A tree shaped like `tree` that holds the path of each leaf."""
    return jax.tree_util.tree_map_with_path(lambda key_path, _: path_name(key_path), tree)


def map_paths(rules: Rules[Value], tree: Any) -> Any:
    """A tree shaped like `tree` that holds for each leaf the value of the first rule matching its path."""
    return jax.tree_util.tree_map_with_path(lambda key_path, _: first_match(rules, path_name(key_path)), tree)
