"""Convert values of config keys and of JSON files to their declared types, and parse them from the command line."""

import ast
import contextlib
import dataclasses
import re
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

_PLAIN = (str, int, float, bool, type(None))
_WORD = r"[\w.@%]+(=[^\s,'\"()\[\]{}]+)?"
_WORDS = re.compile(rf"({_WORD}(\s*,\s*{_WORD})*,?)?")
_LITERAL_ERRORS = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)  # as documented by ast


def convert(value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`.

    Lists become tuples, integers become floats if `hint` is float, and mappings become dataclasses.

    Args:
      value: the value.
      hint: a type annotation: a class, `X | None`, `Literal`, `tuple[X, ...]`, `Sequence[X]`, `dict[str, X]`, a
        dataclass of such types, or `Any`.

    Raises:
      TypeError: the value does not fit. True is not an int, an int has at most 64 bits, and a dataclass needs exactly
        its fields.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object or isinstance(hint, typing.TypeVar):
        return _plain(value)
    if origin in (typing.Union, types.UnionType):
        for choice in arguments:
            with contextlib.suppress(TypeError):
                return convert(value, choice)
        raise TypeError
    if origin is typing.Literal:
        if value not in arguments:
            raise TypeError
        return value
    if origin is dict and isinstance(value, Mapping):
        return {key: convert(item, arguments[1]) for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        hints = typing.get_type_hints(hint)
        if value.keys() != hints.keys():
            raise TypeError
        return hint(**{key: convert(value[key], hints[key]) for key in hints})  # pyright: ignore[reportCallIssue]
    if hint is None:
        hint = types.NoneType
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise TypeError from None
    if hint is int and (isinstance(value, bool) or not isinstance(value, int) or value.bit_length() > 63):
        raise TypeError  # longer integers do not fit an array
    cls: Any = origin or hint
    if isinstance(cls, type) and cls is not str and cls is not bytes and issubclass(cls, Sequence):
        hints = arguments or (Any, ...)
        if not isinstance(value, (list, tuple)):
            raise TypeError
        if origin is not tuple or hints[-1] is Ellipsis:
            hints = hints[:1] * len(value)
        if len(value) != len(hints):
            raise TypeError
        return tuple(map(convert, value, hints))
    if not isinstance(value, cls):
        raise TypeError
    return _plain(value)


def parse(text: str, hint: Any) -> Any:
    """Parse text as a Python literal of type `hint`; strings and tuples of strings ("a,b=1") need no quotes.

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


def _plain(value: Any) -> Any:
    """Allow only values that JSON can hold, so that a config can be compared with the workdir's."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    if not isinstance(value, _PLAIN):
        raise TypeError
    return value
