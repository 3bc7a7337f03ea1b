"""Where clicks come from: Criteo's files, and the vendored flights in the same form.

A row is (label, 13 integers or None, 26 categories as 32-bit hashes).
"""

import itertools
import re
import zlib
from collections.abc import Iterator, Sequence

from etils import epath

from ...dataset import Split
from .. import samples
from ..reading import tsv
from ..reading.records import Malformed
from .click_rows import CATEGORIES, INTEGERS, Fields

FLIGHTS = "nycflights-30000.tsv.xz"
_HEX = re.compile(r"[0-9a-fA-F]{1,8}")
_CRITEO = (
    tsv.Column("int"),
    *[tsv.Column("int", None)] * INTEGERS,
    *[tsv.Column("text", "")] * CATEGORIES,
)
_FLIGHT_FIELDS = (
    *("carrier", "flight", "tailnum", "origin", "dest", "month", "day", "hour", "weekday", "manufacturer", "model"),
    *("engine", "type", "plane year", "engines", "tz", "dst"),
)
# Together with the fields themselves as many categories as Criteo has.
_CROSSES = (
    *(("origin", "dest"), ("carrier", "dest"), ("carrier", "origin"), ("carrier", "flight"), ("origin", "hour")),
    *(("weekday", "hour"), ("month", "weekday"), ("month", "day"), ("carrier", "hour")),
)
_HELD_OUT_MONTHS = ("11", "12")


def criteo(path: epath.Path, lines: tsv.Lines) -> Iterator[Fields | Malformed]:
    """The rows of lines of a file of Criteo's click logs: label, I1..I13, C1..C26, by tabs and without a header.

    Integers may be negative, and all fields but the label may be empty. Categories are up to eight hexadecimal digits:
    hashes by Criteo, taken as they are.
    """
    numbered, parsed = itertools.tee(lines)
    for (number, _), row in zip(numbered, tsv.parse(path, parsed, _CRITEO), strict=True):
        if isinstance(row, Malformed):
            yield row
            continue
        label, categories = row[0], row[1 + INTEGERS :]
        if label not in (0, 1):
            yield Malformed(f"{path}, row {number}", f"label {label} is neither 0 nor 1")
            continue
        bad = next((i for i, text in enumerate(categories) if text and not _HEX.fullmatch(text)), None)
        if bad is not None:
            reason = f"column {2 + INTEGERS + bad} is no hexadecimal number of 32 bits: {categories[bad][:40]!r}"
            yield Malformed(f"{path}, row {number}", reason)
            continue
        yield label, row[1 : 1 + INTEGERS], [int(text, 16) if text else 0 for text in categories]


def flights(split: Split) -> Iterator[Fields]:
    """The vendored flights of a split: those of November and December are held out, which is ten months later.

    Raises:
      UserError: the file is damaged.
    """
    for line in samples.read(FLIGHTS).decode().splitlines():
        label, *fields = line.split("\t")
        integers, texts = fields[:INTEGERS], dict(zip(_FLIGHT_FIELDS, fields[INTEGERS:], strict=True))
        if (texts["month"] in _HELD_OUT_MONTHS) == (split == "heldout"):
            yield int(label), [int(x) if x else None for x in integers], _flight_categories(texts)


def _flight_categories(texts: dict[str, str]) -> Sequence[int]:
    """Hashes of the fields and of the crosses; a cross with an empty field is empty."""
    crosses = ("\t".join(pair) if all(pair := (texts[a], texts[b])) else "" for a, b in _CROSSES)
    return [_hashed(text) for text in (*texts.values(), *crosses)]


def _hashed(text: str) -> int:
    """32 bits of a text, the same everywhere and always; 0 of none and of no other."""
    return (zlib.crc32(text.encode()) or 1) if text else 0
