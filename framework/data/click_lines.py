"""Parse lines of click logs, a block at once: regular rows by NumPy, others one by one, to say what is wrong.

A line has a label, integers and categories, separated by tabs. A category may have several values, separated by commas.
"""

import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from .reading import tsv
from .reading.malformed import Malformed

INTEGERS, CATEGORIES = 13, 26
MISSING = -(2**31)  # an empty integer field; an empty category is 0

Fields = tuple[int, Sequence[int | None], Sequence[Sequence[int]]]  # label, integers, values of the categories

_COLUMNS = 1 + INTEGERS + CATEGORIES
_BLOCK = 4_096  # lines
_MOST_DIGITS = 9  # of integers that surely fit 32 bits
_HEX = re.compile(r"[0-9a-fA-F]{1,8}")
_INT = re.compile(r"-?[0-9]{1,19}")
_TAB, _NEWLINE, _COMMA, _MINUS = b"\t\n,-"
_NO_DIGIT = 255


def _digits(characters: str) -> np.ndarray:
    found = np.full(256, _NO_DIGIT, np.uint8)
    for character in characters:
        found[ord(character)] = int(character, 16)
    return found


_DECIMAL, _HEXADECIMAL = _digits("0123456789"), _digits("0123456789abcdefABCDEF")


def row_type(most_values: int) -> np.dtype:
    """Return the type of a row; `values` tells how many a category has if it may have several, zeros fill the rest."""
    if most_values == 1:
        return np.dtype([("label", "u1"), ("integers", "<i4", INTEGERS), ("categories", "<u4", CATEGORIES)])
    bags = [("values", "u1", CATEGORIES), ("categories", "<u4", (CATEGORIES, most_values))]
    return np.dtype([("label", "u1"), ("integers", "<i4", INTEGERS), *bags])


def parse(path: epath.Path, lines: tsv.Lines, most_values: int = 1) -> Iterator[bytes | Malformed]:
    """Yield the rows of lines of a click log, as bytes of `row_type`, and the malformed ones.

    Integers may be negative; all fields but the label may be empty. Values of categories are hashes, up to eight
    hexadecimal digits.
    """
    while block := list(itertools.islice(lines, _BLOCK)):
        rows, regular = parse_regular([line for _, line in block], most_values)
        content, size = rows.tobytes(), rows.itemsize
        for place, (number, line) in enumerate(block):
            if regular[place]:
                yield content[place * size : (place + 1) * size]
                continue
            row = parse_line(line, most_values)
            yield Malformed(f"{path}, row {number}", row) if isinstance(row, str) else row


def parse_line(line: bytes | None, most_values: int = 1) -> bytes | str:
    """Return the row of a line, or the reason why it is malformed."""
    fields = tsv.parse(line, _COLUMNS)
    row = fields if isinstance(fields, str) else _fields(fields, most_values)
    return row if isinstance(row, str) else packed(row, most_values)


def packed(fields: Fields, most_values: int = 1) -> bytes:
    """Return the bytes of a row; integers are clipped to 32 bits."""
    label, integers, categories = fields
    row = np.zeros((), row_type(most_values))
    row["label"] = label
    row["integers"] = [MISSING if x is None else min(max(x, MISSING + 1), 2**31 - 1) for x in integers]
    if most_values == 1:
        row["categories"] = [values[0] if values else 0 for values in categories]
    else:
        row["values"] = [len(values) for values in categories]
        for place, values in enumerate(categories):
            row["categories"][place, : len(values)] = values
    return row.tobytes()


def _fields(fields: list[str], most_values: int) -> Fields | str:
    """Return the fields of a row, or the reason why it is malformed."""
    label, integers, categories = fields[0], fields[1 : 1 + INTEGERS], fields[1 + INTEGERS :]
    if label not in ("0", "1"):
        return f"label {label[:40]!r} is neither 0 nor 1" if label else "column 1 is empty"
    for number, text in enumerate(integers, start=2):
        if text and not (_INT.fullmatch(text) and -(2**63) <= int(text) < 2**63):
            return f"column {number} is not a 64-bit integer: {text[:40]!r}"
    bags = [text.split(",") if text else [] for text in categories]
    for number, values in enumerate(bags, start=2 + INTEGERS):
        if len(values) > most_values:
            return f"column {number} has {len(values)} values, more than data.most_values={most_values}"
        for text in values:
            if not _HEX.fullmatch(text):
                return f"column {number} is not a 32-bit hexadecimal number: {text[:40]!r}"
    return int(label), [int(x) if x else None for x in integers], [[int(x, 16) for x in values] for values in bags]


def parse_regular(lines: Sequence[bytes | None], most_values: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of `row_type`, and which of them are right: bool [lines]. The others may be well-formed, too."""
    rows, regular = np.zeros(len(lines), row_type(most_values)), np.zeros(len(lines), bool)
    whole = np.array([place for place, line in enumerate(lines) if line is not None and line.endswith(b"\n")], int)
    text = b"".join(lines[place] or b"" for place in whole).replace(b"\r\n", b"\n")
    data = np.frombuffer(text, np.uint8)
    ends = (data == _TAB) | (data == _NEWLINE)
    if most_values > 1:
        ends |= data == _COMMA
    # Of each value: end and length in the text; row, column and number in its field.
    end = np.flatnonzero(ends)
    length = np.diff(end, prepend=-1) - 1
    ends_row, ends_field = data[end] == _NEWLINE, data[end] != _COMMA
    row, field = _before(ends_row), _before(ends_field)
    columns = np.bincount(row, ends_field, len(whole)).astype(int)
    column = field - _before(columns)[row]
    first = np.flatnonzero(np.concatenate([[True], ends_field[:-1]]))
    number = np.arange(len(end)) - first[field]
    several = np.bincount(field, minlength=len(first))[field] > 1

    good = (columns == _COLUMNS)[row]
    is_label, is_category = column == 0, column > INTEGERS
    is_integer = ~is_label & ~is_category
    good &= ~several | (is_category & (length > 0)) & (number < most_values)
    label, right = _numbers(data, end[is_label], length[is_label], _DECIMAL, 10, 1)
    good[is_label] &= right & (label < 2) & (length[is_label] == 1)
    negative = is_integer & (length > 1) & (data[end - length] == _MINUS)
    integer, right = _numbers(data, end[is_integer], (length - negative)[is_integer], _DECIMAL, 10, _MOST_DIGITS)
    good[is_integer] &= right
    category, right = _numbers(data, end[is_category], length[is_category], _HEXADECIMAL, 16, 8)
    good[is_category] &= right
    fine = np.bincount(row, ~good, len(whole)) == 0
    regular[whole] = fine

    def places(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kept = fine[row[chosen]]
        return whole[row[chosen]][kept], kept

    place, kept = places(is_label)
    rows["label"][place] = label[kept]
    place, kept = places(is_integer)
    there = np.where(length[is_integer] == 0, MISSING, np.where(negative[is_integer], -integer, integer))
    rows["integers"][place, column[is_integer][kept] - 1] = there[kept]
    place, kept = places(is_category)
    of, value = column[is_category][kept] - 1 - INTEGERS, category[kept]
    if most_values == 1:
        rows["categories"][place, of] = value
    else:
        rows["categories"][place, of, number[is_category][kept]] = value
        np.add.at(rows["values"], (place, of), length[is_category][kept] > 0)
    return rows, regular


def _numbers(
    data: np.ndarray, end: np.ndarray, length: np.ndarray, digits: np.ndarray, base: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers that end before the places `end`, int64, and which have only digits, at most `most`."""
    value, right = np.zeros(len(end), np.int64), length <= most
    for place in range(most):
        longer = np.flatnonzero(length > place)
        digit = digits[data[end[longer] - 1 - place]]
        value[longer] += digit.astype(np.int64) * base**place
        right[longer] &= digit != _NO_DIGIT
    return value, right


def _before(counts: np.ndarray) -> np.ndarray:
    """Return the sum of the earlier counts, for each."""
    return np.cumsum(counts) - counts
