"""Rules: lists of (regex, value) for parameter paths. The first match wins; every path must match a rule."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

Value = TypeVar("Value")
Rules = Sequence[tuple[str, Value]]


def path_name(key_path: tuple[Any, ...]) -> str:
    """Join a JAX key path with slashes: `decoder/layers/attention/query/kernel`.

    Slashes and tildes within a key become ~1 and ~0, as in JSON pointers (RFC 6901), so that paths are unique.
    """
    keys = [jax.tree_util.keystr((key,), simple=True) for key in key_path]
    return "/".join(key.replace("~", "~0").replace("/", "~1") for key in keys)


def by_path(tree: Any, is_leaf: Callable[[Any], bool]) -> dict[str, Any]:
    """Return path -> leaf of a tree; empty for None."""
    leaves = [] if tree is None else jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {path_name(key_path): leaf for key_path, leaf in leaves}


def paths(tree: Any) -> list[str]:
    """Return the paths of all leaves, in the order of `jax.tree.leaves`."""
    return [path_name(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def state_key(path: str) -> str:
    """Return a path as a key of the optimizer's state, without slashes, which separate keys in checkpoints."""
    return path.replace(".", "~2").replace("/", ".")


def first_match(rules: Rules[Value], path: str) -> Value:
    """Return the value of the first rule whose regex matches the whole path.

    Raises:
      ValueError: no rule matches.
    """
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    tried = ", ".join(repr(pattern) for pattern, _ in rules)
    raise ValueError(f"parameter {path!r}: must match one of {tried}. End the list with ('.*', value).")


def path_tree(tree: Any) -> Any:
    """Return a tree shaped like `tree` with the path of each leaf."""
    return jax.tree_util.tree_map_with_path(lambda key_path, _: path_name(key_path), tree)


def map_paths(rules: Rules[Value], tree: Any) -> Any:
    """Return a tree shaped like `tree` with the value of the first rule that matches each leaf's path."""
    return jax.tree_util.tree_map_with_path(lambda key_path, _: first_match(rules, path_name(key_path)), tree)
