"""Preparing: make the records of a source into shards of rows, once, for all data sets that need it.

A shard depends only on the source, the settings and its number. Workers and processes therefore divide shards by number
without communicating; whichever process finds all shards done writes the manifest, always with the same bytes; and a
preparation that was killed continues with the missing shards.
"""

import abc
import collections
import dataclasses
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from etils import epath

from ...base import bounds, paths
from ...base.bounds import Within
from ...base.errors import UserError
from ...dataset import SPLITS, Source, Split
from ..reading import shards, sources
from ..reading.malformed import Rejects
from . import manifests
from .manifests import Manifest
from .workers import run_in_processes

_ROWS = ".array_record"


class Tally:
    """Counts of one shard: `counts` by noun, `dropped` records by reason, and malformed records."""

    def __init__(self, limit: int):
        self.counts, self.dropped = collections.Counter[str](), collections.Counter[str]()
        self.rejects = Rejects(limit)


@dataclasses.dataclass(frozen=True)
class Preparable(abc.ABC):
    """Base of data sets whose examples are made once."""

    noun: ClassVar[str]  # plural name of a record
    version: ClassVar[int]  # of the row format; raise it when the meaning of prepared files changes
    reading_knobs: ClassVar[tuple[str, ...]] = ()  # knobs that do not change the rows, in addition to the usual ones

    prepared: str = ""  # folder filled by launch.prepare, local or gs://; "" prepares in the workdir
    shard_size: Annotated[int, Within(2)] = 100_000  # source records per shard; shards of 0.1 to 1 GB work well
    workers: Annotated[int, Within(1, 4096)] = 1  # processes that prepare in the workdir
    max_malformed: Annotated[int, Within(0)] = 0  # malformed records of a split that are skipped

    def __post_init__(self):
        bounds.check("data", self)

    @abc.abstractmethod
    def open_source(self) -> sources.Source:
        """Open the source.

        Raises:
          UserError: it cannot be read.
        """

    @abc.abstractmethod
    def rows(
        self, stream: sources.Stream, number: int, records: Iterator[Any], tokenizer: str, tally: Tally
    ) -> Iterator[bytes]:
        """Yield the rows of shard `number` of a stream from its records, without malformed ones.

        Raises:
          UserError: the records cannot be used.
        """

    @abc.abstractmethod
    def row_decoder(self, split: Split, folder: epath.Path, manifest: Manifest) -> shards.Decode:
        """Return the function that decodes rows of a split to examples."""

    def make_tokenizer(self, cache: epath.Path, source: sources.Source) -> str:
        """Return the path of the tokenizer of all rows, "" for rows without one; train it if it is missing."""
        return ""

    def span(self, split: Split, rows: int) -> tuple[int, int]:
        """Return which of the `rows` rows of a split's shards belong to the split: start and stop."""
        return 0, rows

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the rows of a given source; JSON values."""
        others = {"prepared", "workers", "max_malformed", "data_dir", *self.reading_knobs}
        names = [field.name for field in dataclasses.fields(self) if field.name not in others]
        return {"format": self.version} | {name: getattr(self, name) for name in names}

    def prepare(self, cache: str | os.PathLike[str]) -> None:
        """Make the missing rows in `cache`; with `prepared`, check the existing ones.

        One process calls it, before any reads. Finished shards survive a failure. Skipped malformed records are
        reported on stderr, also if the rows exist already.

        Raises:
          UserError: the source or the prepared rows cannot be used, or a split has more than `max_malformed` malformed
            records.
        """
        if self.prepared:
            self.report(self.manifest(cache)[1])
        else:
            run(self, paths.of(cache), workers=self.workers)

    def manifest(self, cache: str | os.PathLike[str]) -> tuple[epath.Path, Manifest]:
        """Return the folder of the rows and its manifest.

        Raises:
          UserError: nothing is prepared for these settings, or files are missing.
        """
        if self.prepared:
            return manifests.find(paths.of(self.prepared), self.settings())
        folder = _folder(self, paths.of(cache), self.open_source())
        if not (folder / manifests.NAME).exists():
            raise UserError(
                f"{cache}: holds no rows of {self.settings()['source']} for these settings; call prepare first"
            )
        return folder, manifests.read(folder)

    def identity(self, source: sources.Source) -> dict[str, Any]:
        """Return the settings and the source's fingerprint."""
        return self.settings() | {"fingerprint": source.fingerprint}

    def examples(self, split: Split, cache: str | os.PathLike[str]) -> Source:
        """Return random access to the rows of a split in the order of the source; raises as `manifest`."""
        folder, manifest = self.manifest(cache)
        files, decode = manifests.of_split(folder, manifest, split), self.row_decoder(split, folder, manifest)
        return shards.ShardRows(files, decode, *manifest["ranges"][split])

    def fingerprint(self, cache: str | os.PathLike[str]) -> str:
        """Return a hash of the rows of both splits, which copying or preparing again keeps; raises as `manifest`."""
        return self.manifest(cache)[1]["content"]

    def report(self, manifest: Manifest) -> None:
        """Print to stderr which records were skipped or dropped.

        Raises:
          UserError: more records are malformed than `max_malformed` allows.
        """
        for name, total in manifest["splits"].items():
            rejects = Rejects(self.max_malformed, **total["malformed"])
            rejects.refuse_excess()
            if rejects.count:
                print(f"{name} {self.noun}: {rejects}, skipped", file=sys.stderr, flush=True)
            if total["dropped"]:
                counts = ", ".join(f"{count:,} {why}" for why, count in total["dropped"].items())
                print(f"{name} {self.noun}: {counts}; dropped", file=sys.stderr, flush=True)


def run(data: Preparable, cache: epath.Path, *, workers: int, process: int = 0, processes: int = 1) -> Manifest | None:
    """Make this process' missing shards, and the manifest once all shards exist.

    Args:
      data: the data set to prepare.
      cache: folder that may hold several preparations.
      workers: number of worker processes.
      process: index of this process.
      processes: number of processes, on this host or others, at once or one after another.

    Returns:
      The manifest; None if shards of other processes are missing.

    Raises:
      UserError: see `Preparable.prepare`.
    """
    source = data.open_source()
    folder = _folder(data, cache, source)
    if (folder / manifests.NAME).exists():
        manifest = manifests.read(folder)
        if not manifests.missing(folder, manifest):
            data.report(manifest)
            return manifest
    try:
        tokenizer = data.make_tokenizer(cache, source)
        jobs = [(data, folder, tokenizer, process * workers + worker, processes * workers) for worker in range(workers)]
        if workers == 1:
            _make_shards(*jobs[0])
        else:
            run_in_processes(_make_shards, jobs)
        manifest = _join(data, folder, tokenizer, source)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}). Free disk space or choose another folder, and "
            "rerun the command; finished shards are kept."
        ) from error
    if manifest is not None:
        for name, total in manifest["splits"].items():
            counted = ", ".join(f"{count:,} {noun}" for noun, count in total.items() if isinstance(count, int))
            print(f"prepared {name}: {counted}", file=sys.stderr, flush=True)
        data.report(manifest)
    return manifest


def _make_shards(data: Preparable, folder: epath.Path, tokenizer: str, worker: int, workers: int) -> None:
    """Make the missing shards of a worker, one of `workers` in all processes, and print a line for each."""
    there, sha256 = _names(folder), _sha256(tokenizer)
    for first, stream in enumerate(data.open_source().streams):
        if stream.one_worker and first % workers != worker:
            continue
        count, began = 0, time.monotonic()
        for number, records in enumerate(stream.blocks()):
            count = number + 1
            name = f"{stream.name}-{number:05}"
            owner = first if stream.one_worker else first + number
            if owner % workers != worker or {f"{name}.json", f"{name}{_ROWS}"} <= there:
                continue
            tally = Tally(data.max_malformed)
            rows = data.rows(stream, number, tally.rejects.sift(records), tokenizer, tally)
            note = {
                "file": f"{name}{_ROWS}",
                "split": stream.split,
                **shards.write(folder / f"{name}{_ROWS}", rows),
                "tokenizer": sha256,
                "counts": dict(tally.counts),
                "dropped": dict(tally.dropped),
                "malformed": tally.rejects.to_json(),
            }
            paths.write_text(folder / f"{name}.json", manifests.to_text(note))
            of, seconds = f" of {stream.shards:05}" if stream.shards else "", time.monotonic() - began
            print(f"shard {name}{of}: {note['rows']:,} rows, after {seconds:,.0f} s", file=sys.stderr, flush=True)
        paths.write_text(folder / f"{stream.name}.json", manifests.to_text({"shards": count}))


def _join(data: Preparable, folder: epath.Path, tokenizer: str, source: sources.Source) -> Manifest | None:
    """Write and return the manifest of all shards; None if some are missing."""
    there = _names(folder)
    notes: list[dict[str, Any]] = []
    for stream in source.streams:
        if f"{stream.name}.json" not in there:
            return None
        for number in range(manifests.read(folder, f"{stream.name}.json")["shards"]):
            name = f"{stream.name}-{number:05}"
            if not {f"{name}.json", f"{name}{_ROWS}"} <= there:
                return None
            notes.append(manifests.read(folder, f"{name}.json"))
    sha256 = _sha256(tokenizer)
    others = [note["file"] for note in notes if note["tokenizer"] != sha256]
    if others:
        raise UserError(f"{folder / others[0]}: was made with another tokenizer. Delete {folder} and prepare again.")
    rows = {split: sum(note["rows"] for note in notes if note["split"] in (split, None)) for split in SPLITS}
    ranges = {split: data.span(split, rows[split]) for split in SPLITS}
    content = [[note["split"], note["rows"], note["content"]] for note in notes]
    manifest: Manifest = {
        "settings": data.identity(source),
        "tokenizer": {"file": os.path.basename(tokenizer), "sha256": sha256},
        "splits": manifests.totals(notes),
        "shards": [{key: note[key] for key in ("file", "split", "rows", "bytes", "content")} for note in notes],
        "ranges": ranges,
        "content": manifests.digest([sha256, content, ranges]),
    }
    for split, (start, stop) in ranges.items():
        if start == stop:
            raise UserError(
                f"data.source={data.settings()['source']}: has no usable {data.noun} for the {split} split. "
                "Give more, or set data.heldout_fraction."
            )
    paths.write_text(folder / manifests.NAME, manifests.to_text(manifest))
    for name in there:
        if name.endswith(".partial"):  # left by a killed process: every shard exists without it
            (folder / name).unlink(missing_ok=True)
    return manifest


def _folder(data: Preparable, cache: epath.Path, source: sources.Source) -> epath.Path:
    return cache / f"rows-{manifests.digest(data.identity(source))}"


def _sha256(path: str) -> str:
    return hashlib.sha256(epath.Path(path).read_bytes()).hexdigest() if path else ""


def _names(folder: epath.Path) -> set[str]:
    return {path.name for path in paths.listed(folder)}
