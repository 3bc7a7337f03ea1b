"""Values of config keys: what fits a declared type, how text on the command line becomes one, how to name a type."""

import ast
import types
import typing
import warnings
from collections.abc import Sequence
from typing import Any

_PLAIN = (str, int, float, bool, type(None))


def convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint` has it: lists become tuples and whole numbers floats where a float is declared.

    `hint` is a type annotation: a class, `X | None`, `Literal`, `tuple[X, ...]`, `Sequence[X]`, `Any`. True is no int.

    Raises:
      TypeError: it does not fit.
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
        raise TypeError  # longer ones fit neither an array nor, from some length on, a line of JSON
    if _is_sequence(origin or hint):
        if not isinstance(value, (list, tuple)):
            raise TypeError
        return _convert_items(tuple(value), hint)
    if not isinstance(value, origin or hint):
        raise TypeError
    return _plain(value)


def parse(text: str, hint: Any) -> Any:
    """The value written as `text`: a Python literal if that fits, else the text itself, so strings need no quotes.

    Raises:
      TypeError: neither fits.
    """
    if hint is bool and text in ("true", "false"):
        return text == "true"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler warns of things like "\d" on the user's terminal
            literal = ast.literal_eval(text.strip())
    except (
        ValueError,
        SyntaxError,
        TypeError,
        MemoryError,
        RecursionError,
    ):  # all that its documentation lists
        return convert(text, hint)
    try:
        return convert(literal, hint)
    except TypeError:
        return convert(text, hint)


def describe(hint: Any) -> str:
    """A type as a person would write it."""
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
    """Only what JSON can hold, so that a workdir can be compared with the config it was made from."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    if not isinstance(value, _PLAIN):
        raise TypeError
    return value
