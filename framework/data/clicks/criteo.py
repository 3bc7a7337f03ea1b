"""Click logs in Criteo's form: parsed once into shards of rows, then read by row at random."""

import dataclasses
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
from etils import epath

from ...base.errors import UserError
from ...dataset import SPLITS, Example, Split
from .. import samples
from ..preparing import manifests
from ..preparing.manifests import Manifest
from ..preparing.preparing import Preparable, Tally
from ..preparing.streams import Stream, blocks_of
from ..reading import files, tsv
from ..reading.malformed import Malformed
from . import rows as click_rows
from .rows import CATEGORIES, INTEGERS, Fields

FLIGHTS = "nycflights-30000.tsv.xz"
_HEX = re.compile(r"[0-9a-fA-F]{1,8}")
_INT = re.compile(r"-?[0-9]{1,19}")
_SHOWN = 40  # characters of a malformed field
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


class Clicks(NamedTuple):
    """The files of a source.

    Attributes:
      parts: (split, path); the split is None if a file's rows belong to both, the path is None for the sample.
      fingerprint: text that changes when the files may have changed.
    """

    parts: Sequence[tuple[Split | None, epath.Path | None]]
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class ClickData(Preparable):
    """Criteo's Kaggle set (train.txt) or terabyte set (day_0 to day_23), or the vendored flights in the same form.

    The cache holds `rows-HASH/`, named by a hash of the settings and the source; a row has 157 bytes. A compressed file
    is read by one worker; the shards of others are divided among all workers.
    """

    noun: ClassVar[str] = "rows"
    version: ClassVar[int] = 2

    source: str = "sample:flights"  # or "file:/path/train.txt", "file:/path/day_*.gz"; training and held-out rows
    heldout_files: str = ""  # glob of the files with held-out rows, "day_23*"; "" holds out the last rows
    heldout_fraction: float = 1 / 7  # of all rows, from the end, without heldout_files; one of Kaggle's seven days
    shard_size: int = 1_000_000  # rows of a file in a shard, 157 MB

    def __post_init__(self):
        super().__post_init__()
        kind, _, name = self.source.partition(":")
        if self.source != "sample:flights" and (kind != "file" or not name):
            raise ValueError(f"data.source={self.source!r}: write 'sample:flights' or 'file:/path/day_*'")
        if self.heldout_files and kind == "sample":
            raise ValueError(
                f"data.heldout_files={self.heldout_files!r}: {self.source} holds out November and December; leave it "
                "empty"
            )
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"data.heldout_fraction={self.heldout_fraction}: must be between 0 and 1")

    @property
    def tokens_per_example(self) -> int:
        """One."""
        return 1

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `rows.spec`."""
        return click_rows.spec()

    def open_source(self) -> Clicks:
        """See `Preparable.open_source`."""
        kind, _, pattern = self.source.partition(":")
        if kind == "sample":
            return Clicks([(split, None) for split in SPLITS], samples.sha256(FLIGHTS))
        found = {*files.find("data.source", pattern)}
        heldout: set[epath.Path] = set()
        if self.heldout_files:
            # A bare name is a file in the same folder.
            beside = os.path.join(os.path.dirname(pattern), self.heldout_files)
            heldout = {*files.find("data.heldout_files", beside)}
        ordered = sorted(found | heldout, key=_numbered)
        parts: list[tuple[Split | None, epath.Path]] = [
            (("heldout" if path in heldout else "train") if heldout else None, path) for path in ordered
        ]
        stats = zip(files.stats(ordered), parts, strict=True)
        return Clicks(parts, manifests.digest([[*stat, split] for stat, (split, _) in stats]))

    def row_knobs(self) -> Sequence[str]:
        """See `Preparable.row_knobs`."""
        return "source", "heldout_files", "heldout_fraction", "shard_size"

    def streams(self, source: Clicks) -> list[Stream]:
        """See `Preparable.streams`; one for each file."""
        return [self._stream(number, *part) for number, part in enumerate(source.parts)]

    def rows(self, stream: Stream, number: int, records: Iterator[Any], tools: Any, tally: Tally) -> Iterator[bytes]:
        """See `Preparable.rows`."""
        for fields in records:
            tally.counts["clicks"] += fields[0]
            yield click_rows.packed(fields)

    def summary(self, folder: epath.Path, manifest: Manifest) -> dict[str, Any]:
        """Return `ranges`: of each split, which rows of its shards belong to it."""
        ranges = {split: self._range(split, manifest["shards"]) for split in SPLITS}
        for split, (start, stop) in ranges.items():
            if start == stop:
                rows = sum(shard["rows"] for shard in manifest["shards"])
                raise UserError(
                    f"data.source={self.source}: has {rows} usable rows and none for the {split} split. Give more, or "
                    "set data.heldout_fraction or data.heldout_files."
                )
        return {"ranges": ranges}

    def row_decoder(self, split: Split, folder: epath.Path, manifest: Manifest) -> Callable[[bytes], Example]:
        """See `Preparable.row_decoder`."""
        return click_rows.unpacked

    def _stream(self, number: int, split: Split | None, path: epath.Path | None) -> Stream:
        if path is None:
            assert split is not None
            return Stream(split, split, lambda: blocks_of(flights(split), self.shard_size), lambda: 0.0)
        meter = files.ReadMeter([path])

        def blocks() -> Iterator[Iterator[Any]]:
            return (parse(path, lines) for lines in blocks_of(tsv.lines(path, meter), self.shard_size))

        size, compressed = max(path.stat().length, 1), path.suffix in files.COMPRESSED
        return Stream(f"{number:05}", split, blocks, meter.fraction, weight=size, one_worker=compressed)

    def _range(self, split: Split, shards: Sequence[dict[str, Any]]) -> tuple[int, int]:
        """Return which rows of the split's shards belong to the split."""
        total = sum(shard["rows"] for shard in shards if shard["split"] in (split, None))
        if all(shard["split"] for shard in shards):
            return 0, total
        boundary = total - round(total * self.heldout_fraction)
        return (0, boundary) if split == "train" else (boundary, total)


def parse(path: epath.Path, lines: tsv.Lines) -> Iterator[Fields | Malformed]:
    """Yield the rows of lines of a Criteo click log: label, I1..I13, C1..C26, separated by tabs, without a header.

    Integers may be negative; all fields but the label may be empty. Categories are hashes by Criteo, up to eight
    hexadecimal digits.
    """
    for number, line in lines:
        fields = tsv.parse(line, 1 + INTEGERS + CATEGORIES)
        row = fields if isinstance(fields, str) else _fields(fields)
        yield Malformed(f"{path}, row {number}", row) if isinstance(row, str) else row


def _fields(fields: list[str]) -> Fields | str:
    """Return the fields of a row, or the reason why it is malformed."""
    label, integers, categories = fields[0], fields[1 : 1 + INTEGERS], fields[1 + INTEGERS :]
    if label not in ("0", "1"):
        return f"label {_short(label)} is neither 0 nor 1" if label else "column 1 is empty"
    for number, text in enumerate(integers, start=2):
        if text and not (_INT.fullmatch(text) and -(2**63) <= int(text) < 2**63):
            return f"column {number} is not a 64-bit integer: {_short(text)}"
    for number, text in enumerate(categories, start=2 + INTEGERS):
        if text and not _HEX.fullmatch(text):
            return f"column {number} is not a 32-bit hexadecimal number: {_short(text)}"
    return int(label), [int(x) if x else None for x in integers], [int(x, 16) if x else 0 for x in categories]


def _short(field: str) -> str:
    return repr(field if len(field) <= _SHOWN else f"{field[: _SHOWN - 3]}...")


def flights(split: Split) -> Iterator[Fields]:
    """Yield the vendored flights of a split; those of November and December are held out.

    Raises:
      UserError: the file is corrupt.
    """
    for line in samples.read(FLIGHTS).decode().splitlines():
        label, *fields = line.split("\t")
        integers, texts = fields[:INTEGERS], dict(zip(_FLIGHT_FIELDS, fields[INTEGERS:], strict=True))
        if (texts["month"] in _HELD_OUT_MONTHS) == (split == "heldout"):
            crosses = ("\t".join(pair) if all(pair := (texts[a], texts[b])) else "" for a, b in _CROSSES)
            hashes = [_hashed(text) for text in (*texts.values(), *crosses)]
            yield int(label), [int(x) if x else None for x in integers], hashes


def _hashed(text: str) -> int:
    """Return a 32-bit hash, the same in every process; 0 only for an empty text."""
    return (zlib.crc32(text.encode()) or 1) if text else 0


def _numbered(path: epath.Path) -> list[str]:
    """Return a sort key by which day_10 comes after day_9."""
    return [text.zfill(20) if text.isdecimal() else text for text in re.split("([0-9]+)", str(path))]
