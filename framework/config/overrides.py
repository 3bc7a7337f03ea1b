"""Apply overrides such as `optimizer.interval=10`, which change one knob of a config from outside its file."""

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from ..base import values
from ..base.errors import UserError
from .components import component, field_types, is_component, known
from .schema import TYPES

_LONGEST = 80  # characters of a value that a message shows


def apply(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Change `config` in place; of two overrides of one key the later holds.

    An override of a component's `name` replaces its section by the defaults of the new class. These overrides are
    applied first, wherever they stand.

    Args:
      config: a locked config.
      overrides: "key.of.the.config=value". The value is a Python literal, or plain text if the knob is a string.

    Raises:
      UserError: the key is unknown, or the value has the wrong type.
    """
    pairs = [_split(override) for override in overrides]
    for key, text in sorted(pairs, key=lambda pair: not _names_component(config, pair[0])):
        _set(config, key, text)


def flat(
    config: ConfigDict | dict[str, Any], whole: Callable[[Any], bool] = lambda section: False
) -> Iterator[tuple[str, Any]]:
    """Yield all values of a config, or of one read from JSON, with their dotted keys.

    Args:
      config: the config.
      whole: whether a section is one value.
    """
    for key, value in config.items():
        if isinstance(value, (ConfigDict, dict)) and not whole(value):
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in flat(value, whole))
        else:
            yield key, value


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Return the error message for an unknown key; the same knob in another section is the best guess."""
    names = list(known)
    namesakes = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    close = namesakes if len(namesakes) == 1 else difflib.get_close_matches(key, names, n=1)
    hint = f"Did you mean 'config.{close[0]}'?" if close else "--help lists all."
    return f"unknown key {f'config.{key}'!r}. {hint}"


def mistyped(key: str, value: Any, hint: Any) -> str:
    """Return the error message for a value of the wrong type."""
    text = repr(value if not isinstance(value, str) or len(value) <= _LONGEST else f"{value[: _LONGEST - 3]}...")
    return f"config.{key}={text}: expected {values.describe(hint)}."


@contextlib.contextmanager
def about(key: str) -> Iterator[None]:
    """Name the key in a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"config.{key}: {error}") from error


def _split(override: str) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise UserError(f"missing value for --config.{override}. Write --config.{override or 'KEY'}=VALUE.")
    return key, text


def _section(config: ConfigDict, key: str) -> Any:
    """Return the section that holds a key, or None if there is no such section."""
    section: Any = config
    for part in key.split(".")[:-1]:
        if not isinstance(section, ConfigDict) or part not in section:
            return None
        section = section[part]
    return section if isinstance(section, ConfigDict) else None


def _names_component(config: ConfigDict, key: str) -> bool:
    return key.endswith(".name") and is_component(_section(config, key))


def _set(config: ConfigDict, key: str, text: str) -> None:
    section, (path, _, last) = _section(config, key), key.rpartition(".")
    if section is None or last not in section:
        raise UserError(unknown_key(key, (name for name, _ in flat(config))))
    inner = section[last]
    if isinstance(inner, ConfigDict):
        fix = f"config.{key}.name" if is_component(inner) else f"one of its keys: {', '.join(inner.keys())}"
        raise UserError(f"config.{key}={text!r}: is a section. Set {fix}.")
    names_component = _names_component(config, key)
    hint = TYPES.get(key, type(inner))
    if is_component(section) and not names_component:
        hint = field_types(section.name).get(last, hint)
    try:
        value = values.parse(text, hint)
    except TypeError:
        raise UserError(mistyped(key, text, hint)) from None
    if names_component and ":" not in value:
        choice = f"{', '.join(known(path))} or your own 'package.module:Class'"
        raise UserError(f"config.{key}={value!r}: must be an import string. Choose {choice}.")
    if names_component and value != section.name:
        with about(key):
            section, last, value = _section(config, path), path.rpartition(".")[2], component(value)
    with section.ignore_type():  # the declared type may allow values of another type than the present one
        section[last] = value
