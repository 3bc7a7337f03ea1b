"""Rows of tab-separated text: UTF-8, one row a line, no quoting, no header."""

from collections.abc import Iterator, Mapping

from etils import epath

from ...base.errors import UserError
from . import files
from .malformed import Malformed

LONGEST_ROW = 1 << 24  # bytes; longer lines are malformed and not held in memory

Lines = Iterator[tuple[int, bytes | None]]  # (line number from 1, line with its end); None is longer than LONGEST_ROW


def lines(path: epath.Path) -> Lines:
    """Yield the lines of a file with their numbers, without blank lines at its end.

    Raises:
      UserError: the file cannot be read.
    """
    blank = 0
    for number, line in enumerate(files.pieces(path, b"\n", LONGEST_ROW), start=1):
        if line in (b"\n", b"\r\n"):
            blank += 1
            continue
        yield from ((number - before, b"\n") for before in range(blank, 0, -1))
        blank = 0
        yield number, line


def read(path: epath.Path) -> Iterator[list[str] | Malformed]:
    """Yield the rows of a file; each must have as many columns as the first readable one.

    Raises:
      UserError: the file cannot be read.
    """
    columns = None
    for number, line in lines(path):
        fields = parse(line, columns)
        if isinstance(fields, str):
            yield Malformed(f"{path}, row {number}", fields)
        else:
            columns = len(fields)
            yield fields


def read_columns(path: epath.Path, knobs: Mapping[str, int]) -> Iterator[list[str] | Malformed]:
    """Yield some columns of each row; they count from 1, and knobs of `data` give them.

    Raises:
      UserError: the file cannot be read, or lacks a column.
    """
    for row in read(path):
        if isinstance(row, Malformed):
            yield row
            continue
        for knob, column in knobs.items():
            if column > len(row):
                raise UserError(f"data.{knob}={column}: but {path} has {len(row)} columns, separated by tabs")
        yield [row[column - 1] for column in knobs.values()]


def parse(line: bytes | None, columns: int | None = None) -> list[str] | str:
    """Return the fields of a line of `lines`, or as a str the reason why it is malformed.

    A line is malformed if it does not have `columns` fields, is not UTF-8, contains NUL or is too long.
    """
    if line is None:
        return f"more than {LONGEST_ROW:,} bytes"
    if b"\0" in line:
        return f"a NUL at byte {line.index(0)}"
    try:
        fields = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8").split("\t")
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"
    if columns is not None and len(fields) != columns:
        return f"{len(fields)} columns, expected {columns}"
    return fields
