"""Rows of tab-separated text: UTF-8, one row a line, no quoting, no header; malformed rows are given as such."""

import dataclasses
import enum
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from etils import epath

from . import files
from .records import Malformed

LONGEST_ROW = 1 << 24  # bytes; what has no line ends is no TSV, and must not be read into memory whole
_SHOWN = 40
_INT = re.compile(r"-?[0-9]{1,19}")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class _Required(enum.Enum):
    REQUIRED = enum.auto()


REQUIRED = _Required.REQUIRED


@dataclasses.dataclass(frozen=True)
class Column:
    """What the fields of a column are.

    Attributes:
      kind: text as it stands, an integer of 64 bits, or a finite decimal number.
      empty: the value of an empty field; without one, a row with an empty field is malformed.
    """

    kind: Literal["text", "int", "float"]
    empty: Any = REQUIRED


Lines = Iterator[tuple[int, bytes | None]]  # with their numbers, from 1; None where one is too long


def lines(path: epath.Path, meter: files.Meter | None = None) -> Lines:
    """The rows of a file as they stand, each with its end.

    Raises:
      UserError: the file cannot be read.
    """
    return enumerate(files.records(path, b"\n", LONGEST_ROW, meter), start=1)


def read(
    path: epath.Path, columns: Sequence[Column] | None = None, *, meter: files.Meter | None = None
) -> Iterator[tuple[Any, ...] | Malformed]:
    """The rows of a file in order; see `parse`.

    Raises:
      UserError: the file cannot be read.
    """
    return parse(path, lines(path, meter), columns)


def parse(
    path: epath.Path, some: Lines, columns: Sequence[Column] | None = None
) -> Iterator[tuple[Any, ...] | Malformed]:
    """One tuple of values for each line in order, or what is wrong with it.

    Malformed is a row with more or fewer columns, a field that is not of its kind, a byte that is not UTF-8 or is NUL,
    and a row of more than `LONGEST_ROW` bytes.

    Args:
      path: the TSV file that they are of, compressed if its name ends in .xz or .gz.
      some: lines of `lines`.
      columns: of every row; None takes as many columns of text, empty or not, as the first readable row has.
    """
    for number, line in some:
        place = f"{path}, row {number}"
        try:
            fields = _fields(line)
            if columns is None:
                columns = (Column("text", ""),) * len(fields)
            if len(fields) != len(columns):
                raise _BadRowError(f"{len(fields)} columns, expected {len(columns)}")
            yield tuple(map(_value, range(1, len(fields) + 1), fields, columns))
        except _BadRowError as error:
            yield Malformed(place, str(error))


class _BadRowError(Exception):
    """What is wrong with a row."""


def _fields(line: bytes | None) -> list[str]:
    if line is None:
        raise _BadRowError(f"more than {LONGEST_ROW:,} bytes")
    if b"\0" in line:
        raise _BadRowError(f"a NUL at byte {line.index(0)}")
    try:
        return line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8").split("\t")
    except UnicodeDecodeError as error:
        raise _BadRowError(f"not UTF-8 at byte {error.start}") from None


def _value(number: int, field: str, column: Column) -> Any:
    if not field:
        if column.empty is REQUIRED:
            raise _BadRowError(f"column {number} is empty")
        return column.empty
    if column.kind == "text":
        return field
    # int() and float() take more than a file should hold: "1_000", " 7", "nan", digits of other scripts.
    if column.kind == "int":
        if _INT.fullmatch(field) and -(2**63) <= (whole := int(field)) < 2**63:
            return whole
        raise _BadRowError(f"column {number} is no integer of 64 bits: {_short(field)}")
    if _FLOAT.fullmatch(field) and math.isfinite(real := float(field)):
        return real
    raise _BadRowError(f"column {number} is no finite number: {_short(field)}")


def _short(field: str) -> str:
    return repr(field if len(field) <= _SHOWN else f"{field[: _SHOWN - 3]}...")
