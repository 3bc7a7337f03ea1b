"""Read JSON files that a run has written, or that a user may have damaged."""

import dataclasses
import json
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from .errors import UserError

_DEEPEST = 32  # levels of nesting; our files have far fewer, and readers that recurse can walk through so many


def read_object(path: pathlib.Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if the file does not exist.

    Raises:
      UserError: the file cannot be read or holds something else.
    """
    if not path.is_file():
        return None
    try:
        content = parse_object(path.read_text())
    except UnicodeDecodeError:
        content = None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from error
    if content is None:
        raise UserError(f"{path} is not a JSON object. Restore it or use another workdir.")
    return content


def parse_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object in a text, or None if the text holds something else or is nested too deeply."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, an integer of thousands of digits, or thousands of levels
        return None
    return content if isinstance(content, dict) and _is_shallow(content) else None


def build(hint: Any, content: Any, name: str) -> Any:
    """Return JSON content as a value of a type, such as a dataclass of such values.

    Args:
      hint: a dataclass, `int` (at least 0), `float`, `str` (printable), `tuple[X, ...]`, `dict[str, X]`, `X | None` or
        `Any`.
      content: parsed JSON.
      name: name of the content in errors.

    Raises:
      ValueError: the content has another type, or keys are missing or unknown.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return content
    if origin is types.UnionType:
        return None if content is None else build(arguments[0], content, name)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        if not isinstance(content, Mapping) or content.keys() != hints.keys():
            raise ValueError(f"{name} must be a JSON object with {', '.join(hints)}, not {content!r:.50}")
        return hint(**{key: build(hints[key], value, f"{name}.{key}") for key, value in content.items()})
    if origin is dict and isinstance(content, Mapping):
        return {build(str, key, name): build(arguments[1], value, f"{name}.{key}") for key, value in content.items()}
    if origin is tuple and isinstance(content, list):
        return tuple(build(arguments[0], value, name) for value in content)
    if hint is float and is_number(content):
        return float(content)
    if hint is int and type(content) is int and 0 <= content < 2**63:
        return content
    if hint is str and isinstance(content, str) and content.isprintable():  # a terminal acts on control characters
        return content
    raise ValueError(f"{name} must be {getattr(hint, '__name__', hint)}, not {content!r:.50}")


def is_number(value: Any) -> bool:
    """Return whether a value read from JSON is a number that fits a float64. Booleans are not numbers."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _is_shallow(content: Any) -> bool:
    level = [content]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in level if isinstance(inner, (dict, list))]
        if not level:
            return True
    return False
