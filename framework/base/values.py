"""Convert values of config keys to their declared types, and parse them from the command line."""

import ast
import re
import types
import typing
import warnings
from collections.abc import Sequence
from typing import Any

_PLAIN = (str, int, float, bool, type(None))
_WORDS = re.compile(r"([\w.]+(\s*,\s*[\w.]+)*,?)?")
_LITERAL_ERRORS = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)  # as documented by ast


def convert(value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`: lists become tuples, and integers become floats if `hint` is float.

    Args:
      value: the value.
      hint: a type annotation: a class, `X | None`, `Literal`, `tuple[X, ...]`, `Sequence[X]` or `Any`.

    Raises:
      TypeError: the value does not fit. True is not an int, and an int has at most 64 bits.
    """
    origin = typing.get_origin(hint)
    if hint is Any or hint is object or isinstance(hint, typing.TypeVar):
        return _plain(value)
    if origin in (typing.Union, types.UnionType):
        return _first_fit(value, typing.get_args(hint))
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise TypeError
        return value
    if hint is None:
        hint = types.NoneType
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise TypeError from None
    if hint is int and (isinstance(value, bool) or not isinstance(value, int) or value.bit_length() > 63):
        raise TypeError  # longer integers do not fit an array
    if _is_sequence(origin or hint):
        if not isinstance(value, (list, tuple)):
            raise TypeError
        return _convert_items(tuple(value), hint)
    if not isinstance(value, origin or hint):
        raise TypeError
    return _plain(value)


def parse(text: str, hint: Any) -> Any:
    """Parse text as a Python literal of type `hint`; strings and tuples of strings ("a,b") need no quotes.

    Raises:
      TypeError: the text does not fit.
    """
    if hint is bool and text in ("true", "false"):
        return text == "true"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler would warn the user about "\d"
            return convert(ast.literal_eval(text.strip()), hint)
    except _LITERAL_ERRORS:
        if hint == tuple[str, ...] and _WORDS.fullmatch(text):
            return tuple(word.strip() for word in text.split(",") if word)
        return convert(text, hint)


def describe(hint: Any) -> str:
    """Return the name of a type for people."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is None and isinstance(hint, type):
        return "None" if hint is types.NoneType else hint.__name__
    return str(hint).replace("typing.", "").replace("collections.abc.", "")


def _first_fit(value: Any, hints: Sequence[Any]) -> Any:
    for hint in hints:
        try:
            return convert(value, hint)
        except TypeError:
            continue
    raise TypeError


def _is_sequence(cls: Any) -> bool:
    return isinstance(cls, type) and cls is not str and cls is not bytes and issubclass(cls, Sequence)


def _convert_items(items: tuple[Any, ...], sequence_hint: Any) -> tuple[Any, ...]:
    hints = typing.get_args(sequence_hint) or (Any, ...)
    if typing.get_origin(sequence_hint) is not tuple or hints[-1] is Ellipsis:
        return tuple(convert(item, hints[0]) for item in items)
    if len(items) != len(hints):
        raise TypeError
    return tuple(convert(item, hint) for item, hint in zip(items, hints, strict=True))


def _plain(value: Any) -> Any:
    """Allow only values that JSON can hold, so that a config can be compared with the workdir's."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    if not isinstance(value, _PLAIN):
        raise TypeError
    return value
