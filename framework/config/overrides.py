"""Overrides: `optimizer.interval=10`, one knob of a config changed from outside its file."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from ..base import values
from ..base.errors import UserError
from .components import component, did_you_mean, field_types, is_component


def apply(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Change `config` in place; of two overrides of one key the later holds.

    Overrides of a component's `name` come first wherever they stand: they replace its section by that of the new class,
    with the defaults of that class.

    Args:
      config: a locked config.
      overrides: "key.of.the.config=value". The value is a Python literal, or plain text where text is expected.

    Raises:
      UserError: no such key, or not a value of its type.
    """
    pairs = [_split(override) for override in overrides]
    switches = [(key, text) for key, text in pairs if is_component(_section(config, key)) and key.endswith(".name")]
    for key, text in switches:
        _switch(config, key, text)
    for key, text in pairs:
        if (key, text) not in switches:
            _set(config, key, text)


def flat(config: ConfigDict | dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All values of a config, or of one read back from JSON, by their dotted keys."""
    for key, value in config.items():
        if isinstance(value, (ConfigDict, dict)):
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in flat(value))
        else:
            yield key, value


def type_of(section: Any, key: str) -> Any:
    """The type a key is declared with: the annotation of a component's field, else the type of its value.

    Raises:
      UserError: a component's class has no such field, which happens where a file sets its name without its fields.
    """
    if not is_component(section) or key == "name":
        return type(section[key])
    hints = field_types(section.name)
    if key not in hints:
        raise UserError(f"{section.name} has no field {key!r}{did_you_mean(key, hints)}")
    return hints[key]


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message for a key that there is not; the knob of the same name in another section is the best guess."""
    names = list(known)
    namesakes = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    close = namesakes if len(namesakes) == 1 else difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {f'config.{close[0]}'!r}?" if close else "--help lists all"
    return f"unknown key {f'config.{key}'!r}; {hint}"


def _split(override: str) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise UserError(f"{f'config.{override}'!r} gives no value; write config.KEY=VALUE")
    return key, text


def _section(config: ConfigDict, key: str) -> Any:
    """The section that holds a key, None where the path to it does not exist."""
    section: Any = config
    for part in key.split(".")[:-1]:
        if not isinstance(section, ConfigDict) or part not in section:
            return None
        section = section[part]
    return section if isinstance(section, ConfigDict) else None


def _switch(config: ConfigDict, key: str, text: str) -> None:
    name = values.parse(text, str)
    path = key.removesuffix(".name")
    parent = _section(config, path)
    last = path.rpartition(".")[2]
    if parent[last].name == name:
        return
    try:
        parent[last] = component(name)
    except UserError as error:
        raise UserError(f"config.{key}: {error}") from error


def _set(config: ConfigDict, key: str, text: str) -> None:
    section, last = _section(config, key), key.rpartition(".")[2]
    if section is None or last not in section:
        raise UserError(unknown_key(key, (name for name, _ in flat(config))))
    if isinstance(section[last], ConfigDict):
        inner = section[last]
        fix = f"config.{key}.name=..." if is_component(inner) else f"one of {', '.join(inner.keys())}"
        raise UserError(f"config.{key} is a section, given {_short(text)}; set {fix}")
    hint = type_of(section, last)
    try:
        value = values.parse(text, hint)
    except TypeError:
        raise UserError(f"config.{key}: expected {values.describe(hint)}, given {_short(text)}") from None
    with section.ignore_type():  # the annotation has been checked, and may allow types that the old value has not
        section[last] = value


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
