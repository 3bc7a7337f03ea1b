"""Click logs in Criteo's form: parsed once into shards of rows, then read by row at random."""

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
from etils import epath

from ...base.errors import UserError
from ...dataset import SPLITS, Split
from .. import samples
from ..preparing import manifests
from ..preparing.jobs import Tally
from ..preparing.manifests import Manifest
from ..preparing.preparing import Preparable
from ..preparing.streams import Stream, cut
from ..reading import files, tsv
from ..reading.shards import ShardRows
from . import click_rows, click_sources

# Part of every cache name: raise it when the meaning of cached files changes.
_CACHE_FORMAT = 2


class _Part(NamedTuple):
    """A source file, None for the sample; its split, None where a file's rows belong to both."""

    split: Split | None
    path: epath.Path | None


class Clicks(NamedTuple):
    """The files of a source."""

    parts: Sequence[_Part]
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class ClickData(Preparable):
    """Criteo's Kaggle set (train.txt) or terabyte (day_0 to day_23), or the vendored flights in the same form.

    The cache holds `rows-HASH/`, named by a hash of the settings and of the source: a row has 157 bytes. Compressed
    files go to one worker each, others are shared out by shards.
    """

    noun: ClassVar[str] = "rows"

    source: str = "sample:flights"  # or "file:/path/train.txt", "file:/path/day_*.gz"; of train and held-out together
    heldout_files: str = ""  # glob of those files whose rows are held out, "day_23*"; "" holds out the last rows
    heldout_fraction: float = 1 / 7  # of all rows, at the end, where no files are held out; one of Kaggle's seven days
    shard_size: int = 1_000_000  # rows of a file in a shard, 157 MB

    def __post_init__(self):
        super().__post_init__()
        kind, _, name = self.source.partition(":")
        if self.source != "sample:flights" and (kind != "file" or not name):
            raise ValueError(f"data.source is {self.source!r}; write 'sample:flights' or 'file:/path/day_*'")
        if self.heldout_files and kind == "sample":
            raise ValueError(
                f"data.heldout_files is {self.heldout_files!r}, but {self.source} holds out November and December; "
                "leave it empty"
            )
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"data.heldout_fraction is {self.heldout_fraction}; it must lie between 0 and 1")

    @property
    def tokens_per_example(self) -> int:
        """An example counts as one."""
        return 1

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of an example; see `click_rows.spec`."""
        return click_rows.spec()

    def open_source(self) -> Clicks:
        """See `Preparable.open_source`."""
        parts = self._parts()
        if self.source.startswith("sample:"):
            return Clicks(parts, samples.sha256(click_sources.FLIGHTS))
        stats = files.stats([part.path for part in parts if part.path is not None])
        return Clicks(parts, manifests.digest([[*stat, part.split] for stat, part in zip(stats, parts, strict=True)]))

    def settings(self) -> dict[str, Any]:
        """See `Preparable.settings`; `max_malformed` only decides whether there are any rows."""
        return {
            "format": _CACHE_FORMAT,
            "source": self.source,
            "heldout_files": self.heldout_files,
            "heldout_fraction": self.heldout_fraction,
            "shard_size": self.shard_size,
        }

    def streams(self, source: Clicks) -> list[Stream]:
        """See `Preparable.streams`; one for each file."""
        return [self._stream(number, part) for number, part in enumerate(source.parts)]

    def rows(self, stream: Stream, number: int, records: Iterator[Any], tools: Any, tally: Tally) -> Iterator[bytes]:
        """See `Preparable.rows`."""
        for fields in records:
            tally.counts["clicks"] += fields[0]
            yield click_rows.packed(fields)

    def summary(self, folder: epath.Path, manifest: Manifest) -> dict[str, Any]:
        """Which rows are whose: `ranges` of each split, of the rows of its shards."""
        ranges = {split: self._range(split, manifest["shards"]) for split in SPLITS}
        for split, (start, stop) in ranges.items():
            if start == stop:
                rows = sum(shard["rows"] for shard in manifest["shards"])
                raise UserError(
                    f"{self.source} has {rows} usable rows and none for the {split} split; give more, or set "
                    "data.heldout_fraction or data.heldout_files"
                )
        return {"ranges": ranges}

    def examples(self, split: Split, cache: str | os.PathLike[str]) -> ShardRows:
        """The examples of a split, in the source's order; random access, picklable.

        Raises:
          UserError: nothing is prepared for these settings in `cache`.
        """
        folder, manifest = self.manifest(cache)
        shards, counts = manifests.of_split(folder, manifest, split)
        return ShardRows(shards, counts, click_rows.unpacked, *self._range(split, manifest["shards"]))

    def _stream(self, number: int, part: _Part) -> Stream:
        path = part.path
        if path is None:
            assert part.split is not None
            split = part.split
            return Stream(
                split, split, lambda: cut(click_sources.flights(split), self.shard_size), lambda: 0.0, weight=1.0
            )
        meter = files.Meter([path])

        def blocks() -> Iterator[Iterator[Any]]:
            for lines in cut(tsv.lines(path, meter), self.shard_size):
                yield click_sources.criteo(path, lines)

        return Stream(
            f"{number:05}",
            part.split,
            blocks,
            meter.share,
            weight=max(path.stat().length, 1),
            together=path.suffix in files.COMPRESSED,
        )

    def _range(self, split: Split, shards: Sequence[dict[str, Any]]) -> tuple[int, int]:
        """Which rows of the split's shards are the split's own."""
        total = sum(shard["rows"] for shard in shards if shard["split"] in (split, None))
        if all(shard["split"] for shard in shards):
            return 0, total
        boundary = total - round(total * self.heldout_fraction)
        return (0, boundary) if split == "train" else (boundary, total)

    def _parts(self) -> list[_Part]:
        kind, _, pattern = self.source.partition(":")
        if kind == "sample":
            return [_Part(split, None) for split in SPLITS]
        found = _files("data.source", pattern)
        if not self.heldout_files:
            return [_Part(None, path) for path in found]
        # A bare name means a file beside the others.
        heldout = set(_files("data.heldout_files", os.path.join(os.path.dirname(pattern), self.heldout_files)))
        return [
            _Part("heldout" if path in heldout else "train", path) for path in sorted({*found} | heldout, key=_numbered)
        ]


def _files(knob: str, pattern: str) -> list[epath.Path]:
    """The files that a glob matches, by number where their names have one: day_10 comes after day_9."""
    found = files.found(pattern)
    if not found:
        raise UserError(f"{knob} {pattern!r} matches no file; check the path")
    files.refuse_unreadable(found)
    return sorted(found, key=_numbered)


def _numbered(path: epath.Path) -> list[str]:
    """A key that sorts numbers in names by their size."""
    return [text.zfill(20) if text.isdecimal() else text for text in re.split("([0-9]+)", str(path))]
