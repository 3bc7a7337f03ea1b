"""Click logs in Criteo's form: parsed once into shards of rows, then read by row at random."""

import dataclasses
import functools
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
from etils import epath

from ..base.bounds import Within
from ..dataset import Example, Split
from . import samples
from .click_lines import INTEGERS, packed, parse, row_type
from .preparing import manifests
from .preparing.manifests import Manifest
from .preparing.preparing import Preparable, Tally
from .reading import files, shards, tsv
from .reading.sources import Blocks, Cursor, Source, Stream, blocks_of, of_splits

FLIGHTS = "nycflights-30000.tsv.xz"
_SUFFIXES = (".txt", ".tsv", "")
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


@dataclasses.dataclass(frozen=True)
class ClickData(Preparable):
    """Criteo's Kaggle set (train.txt) or terabyte set (day_0 to day_23), or the vendored flights in the same form.

    The cache holds `rows-HASH/`, named by a hash of the settings and the source; a row has 157 bytes. A compressed file
    is read by one worker; the shards of others are divided among all workers.
    """

    noun: ClassVar[str] = "rows"
    version: ClassVar[int] = 2
    tokens_per_example: ClassVar[int] = 1

    source: str = "sample:flights"  # or "file:/path/train.txt", "file:/path/day_*.gz"; training and held-out rows
    heldout_files: str = ""  # glob of the files with held-out rows, "day_23*"; "" holds out heldout_fraction of all
    heldout_fraction: Annotated[float, Within(1e-9, 0.999)] = 1 / 7  # from the end; a day of Kaggle's week
    shard_size: Annotated[int, Within(2)] = 1_000_000  # rows of a file in a shard, 157 MB
    most_values: Annotated[int, Within(1, 255)] = 1  # of a category, separated by commas; above 1, fields are multi-hot

    def __post_init__(self):
        super().__post_init__()
        kind, _, name = self.source.partition(":")
        if self.source != "sample:flights" and (kind != "file" or not name):
            raise ValueError(f"data.source={self.source!r}: write 'sample:flights' or 'file:/path/day_*'")
        if self.most_values > 1 and kind == "sample":
            raise ValueError(f"data.most_values={self.most_values}: {self.source} has one value in a field; use 1")
        if self.heldout_files and kind == "sample":
            raise ValueError(
                f"data.heldout_files={self.heldout_files!r}: {self.source} holds out November and December; leave it "
                "empty"
            )

    def settings(self) -> dict[str, Any]:
        """See `Preparable.settings`."""
        settings = super().settings()
        return settings if self.most_values > 1 else {k: v for k, v in settings.items() if k != "most_values"}

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shapes and types of an example."""
        (of_zeros,) = examples(np.zeros(1, row_type(self.most_values)))
        return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in of_zeros.items()}

    def open_source(self) -> Source:
        """See `Preparable.open_source`; one stream for each file."""
        kind, _, pattern = self.source.partition(":")
        if kind == "sample":
            return of_splits(samples.sha256(FLIGHTS), flights, self.shard_size)
        found = files.find("data.source", pattern, _SUFFIXES)
        heldout: list[epath.Path] = []
        if self.heldout_files:
            # A bare name is a file in the same folder.
            beside = os.path.join(os.path.dirname(pattern), self.heldout_files)
            heldout = files.find("data.heldout_files", beside, _SUFFIXES)
        every = {files.identity(path): path for path in [*found, *heldout]}
        ordered = sorted(every.values(), key=_numbered)
        splits: list[Split | None] = [
            ("heldout" if path in heldout else "train") if heldout else None for path in ordered
        ]
        streams = [
            Stream(
                f"{number:05}", split, functools.partial(self._blocks, path), one_worker=path.suffix in files.COMPRESSED
            )
            for number, (split, path) in enumerate(zip(splits, ordered, strict=True))
        ]
        return Source(manifests.digest([files.stats(ordered), splits]), streams, files.text_bytes(ordered))

    def rows(
        self, stream: Stream, number: int, records: Iterator[Any], tokenizer: str, tally: Tally
    ) -> Iterator[bytes]:
        """See `Preparable.rows`."""
        for row in records:
            tally.counts["clicks"] += row[0]  # the label
            yield row

    def span(self, split: Split, rows: int) -> tuple[int, int]:
        """See `Preparable.span`."""
        if self.heldout_files or self.source.startswith("sample:"):
            return 0, rows
        boundary = rows - round(rows * self.heldout_fraction)
        return (0, boundary) if split == "train" else (boundary, rows)

    def row_decoder(self, split: Split, folder: epath.Path, manifest: Manifest) -> shards.Decode:
        """See `Preparable.row_decoder`."""
        return decoder(self.most_values)

    def _blocks(self, path: epath.Path, cursor: Cursor | None = None) -> Blocks:
        return (parse(path, lines, self.most_values) for lines in blocks_of(tsv.lines(path), self.shard_size))


def flights(split: Split) -> Iterator[bytes]:
    """Yield the rows of the vendored flights of a split; those of November and December are held out."""
    for line in samples.read(FLIGHTS).decode().splitlines():
        label, *fields = line.split("\t")
        integers, texts = fields[:INTEGERS], dict(zip(_FLIGHT_FIELDS, fields[INTEGERS:], strict=True))
        if (texts["month"] in _HELD_OUT_MONTHS) == (split == "heldout"):
            crosses = ("\t".join(pair) if all(pair := (texts[a], texts[b])) else "" for a, b in _CROSSES)
            hashes = [[_hashed(text)] for text in (*texts.values(), *crosses)]
            yield packed((int(label), [int(x) if x else None for x in integers], hashes))


def _hashed(text: str) -> int:
    """Return a 32-bit hash, the same in every process; 0 only for an empty text."""
    return (zlib.crc32(text.encode()) or 1) if text else 0


def _numbered(path: epath.Path) -> list[str]:
    """Return a sort key by which day_10 comes after day_9."""
    return [text.zfill(20) if text.isdecimal() else text for text in re.split("([0-9]+)", str(path))]


def examples(rows: np.ndarray) -> list[Example]:
    """Return the examples of rows of a `row_type`."""
    return shards.rows_of(columns(rows))


def columns(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the arrays [rows, ...] of rows of a `row_type`.

    label: 1 for a click. weight: 1; padding examples have 0. integers: counts, which may be negative; `MISSING` for an
    empty field. categories: 32-bit hashes, which a model maps to the rows of its tables. values: how many of them a
    category has, if it may have several.
    """
    values = {"values": rows["values"].astype(np.int32)} if "values" in (rows.dtype.names or ()) else {}
    return {
        "label": rows["label"].astype(np.int32),
        "weight": np.ones(len(rows), np.float32),
        "integers": rows["integers"].astype(np.int32),
        "categories": rows["categories"].astype(np.uint32),
        **values,
    }


def decoder(most_values: int) -> shards.Columns:
    """Return the decoder of rows whose categories have up to `most_values` values."""
    return shards.Columns(functools.partial(_columns_of, row_type=row_type(most_values)))


def _columns_of(contents: Sequence[bytes], row_type: np.dtype) -> dict[str, np.ndarray]:
    return columns(np.frombuffer(b"".join(contents), row_type))
