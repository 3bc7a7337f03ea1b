"""Clicks as fixed-size binary rows in ArrayRecord files: written once in order, read one by one at random.

Groups of 64 uncompressed rows: to read one costs 9 microseconds of a core, where groups of one, which grain asks for,
cost 230. A row of a damaged file is refused, since ArrayRecord keeps a checksum of each group.
"""

import bisect
import hashlib
import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from ..errors import UserError
from .records import Rejects

INTEGERS, CATEGORIES = 13, 26
# Stands for an empty field among the integers. An empty category is 0, like any category whose hash that is.
MISSING = -(2**31)
ROW = np.dtype([("label", "u1"), ("integers", "<i4", INTEGERS), ("categories", "<u4", CATEGORIES)])
_OPTIONS = "group_size:64,uncompressed"

Fields = tuple[int, Sequence[int | None], Sequence[int]]


def spec() -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of an example.

    label: 1 for a click. weight: 1, so that examples of zeros have none. integers: counts, which may be negative;
    `MISSING` where the field was empty. categories: 32-bit hashes, which a model maps to the rows of its tables.
    """
    return {
        "label": jax.ShapeDtypeStruct((), np.int32),
        "weight": jax.ShapeDtypeStruct((), np.float32),
        "integers": jax.ShapeDtypeStruct((INTEGERS,), np.int32),
        "categories": jax.ShapeDtypeStruct((CATEGORIES,), np.uint32),
    }


def packed(fields: Fields) -> bytes:
    """A row of (label, integers or None, hashes of categories); integers beyond 32 bits become the nearest within."""
    label, integers, categories = fields
    row = np.empty((), ROW)
    row["label"] = label
    row["integers"] = [MISSING if x is None else min(max(x, MISSING + 1), 2**31 - 1) for x in integers]
    row["categories"] = categories
    return row.tobytes()


def example(row: Any) -> dict[str, np.ndarray]:
    """The example that a row, one element of type `ROW`, holds."""
    return {
        "label": np.asarray(row["label"], np.int32),
        "weight": np.ones((), np.float32),
        "integers": row["integers"].astype(np.int32),
        "categories": row["categories"].astype(np.uint32),
    }


class Written(NamedTuple):
    """What `write` has done: the number of rows and clicks, and a hash of the rows."""

    rows: int
    clicks: int
    content: str


def write(path: Path, rows: Iterable[Fields], progress: "Progress") -> Written:
    """Stream rows to a file."""
    count = clicks = 0
    content = hashlib.sha256()
    writer = ArrayRecordWriter(str(path), _OPTIONS)
    try:
        for fields in rows:
            row = packed(fields)
            writer.write(row)
            content.update(row)
            count += 1
            clicks += fields[0]
            progress.add()
    finally:
        writer.close()
    return Written(count, clicks, content.hexdigest())


class ClickRows:
    """Random access to the rows `start` to `stop` of files taken one after the other; a pickled copy carries no reader.

    Args:
      paths: files of `write`.
      counts: how many rows each of them has.
      start, stop: as of a slice.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], start: int, stop: int):
        self._paths, self._start, self._stop = tuple(paths), start, stop
        self._ends = tuple(itertools.accumulate(counts))
        assert 0 <= start <= stop <= (self._ends[-1] if self._ends else 0), (start, stop, counts)

    @cached_property
    def _readers(self) -> list[ArrayRecordReader]:
        readers = [ArrayRecordReader(str(path), "readahead_buffer_size:0") for path in self._paths]
        found = tuple(itertools.accumulate(reader.num_records() for reader in readers))
        if found != self._ends:
            raise UserError(
                f"{self._paths[0].parent} has files of other lengths than its stamp; remove it to make it anew"
            )
        return readers

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_readers"}

    def __repr__(self) -> str:
        return f"ClickRows({self._paths[0].parent if self._paths else 'nothing'}, {self._start}:{self._stop})"

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        place = range(self._start, self._stop)[index]
        file = bisect.bisect_right(self._ends, place)
        within = place - (self._ends[file - 1] if file else 0)
        try:
            (record,) = self._readers[file].read([within])
        except RuntimeError as error:
            raise UserError(
                f"{self._paths[file]}, row {within + 1} cannot be read ({str(error)[:80]}); remove "
                f"{self._paths[file].parent}, and it is made again"
            ) from None
        return example(np.frombuffer(record, ROW)[0])


class Progress:
    """One line on stderr that counts rows: rewritten on a terminal, elsewhere printed at the end."""

    def __init__(self, label: str, rejects: Rejects):
        self._label, self._rejects, self._rows = label, rejects, 0
        self._begun = self._shown = time.monotonic()

    def add(self) -> None:
        """Count one row."""
        self._rows += 1
        if self._rows % 1024 == 0 and sys.stderr.isatty() and time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            print(f"\r{self}", end="", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Print the totals."""
        print(f"{chr(13) if sys.stderr.isatty() else ''}{self}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self._begun, 1e-3)
        skipped = f", {self._rejects.count:,} malformed skipped" if self._rejects.count else ""
        return f"{self._label}: {self._rows:,} rows ({self._rows / seconds:,.0f} rows/s){skipped}"
