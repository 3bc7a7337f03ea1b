"""Preparing: make the records of a source into shards of rows, once, for all data sets that need it.

A shard depends only on the source, the settings and its number. Workers and processes therefore divide shards by number
without communicating; whichever process finds all shards done writes the manifest, always with the same bytes; and a
preparation that was killed continues with the missing shards.
"""

import abc
import collections
import contextlib
import dataclasses
import importlib.metadata
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from typing import Any, ClassVar

from etils import epath

from ...base import paths
from ...base.errors import UserError
from ...dataset import Example, Source, Split
from ..reading import shards
from ..reading.malformed import Rejects
from . import manifests
from .manifests import Manifest
from .progress import FIELDS, ProgressLines, WorkerCounter
from .streams import Stream
from .workers import run_in_processes

_ROWS = ".array_record"
_LIBRARIES = ("array-record", "numpy", "tokenizers")  # versions in the manifest


@dataclasses.dataclass(frozen=True)
class Ingredients:
    """The common inputs of all shards of a preparation; picklable.

    Attributes:
      tokenizer: path of its JSON file, "" for data without one.
      sha256: hash of that file.
      known: held-out sources that also occur in training.
    """

    tokenizer: str = ""
    sha256: str = ""
    known: frozenset[str] = frozenset()


class Tally:
    """Counts of one shard: `counts` by noun, `dropped` records by reason, and malformed records."""

    def __init__(self, limit: int):
        self.counts, self.dropped = collections.Counter[str](), collections.Counter[str]()
        self.rejects = Rejects(limit)


@dataclasses.dataclass(frozen=True)
class Worker:
    """One of `of` workers, over all processes; it makes every `of`th shard."""

    index: int
    of: int

    def owns(self, stream: Stream, stream_number: int, number: int) -> bool:
        """Return whether it makes shard `number` of a stream."""
        return (stream_number if stream.one_worker else stream_number + number) % self.of == self.index


@dataclasses.dataclass(frozen=True)
class Preparable(abc.ABC):
    """Base of data sets whose examples are made once."""

    noun: ClassVar[str]  # plural name of a record
    version: ClassVar[int]  # of the row format; raise it when the meaning of prepared files changes

    prepared: str = ""  # folder filled by launch.prepare, local or gs://; "" prepares in the workdir
    shard_size: int = 100_000  # source records per shard; shards of 0.1 to 1 GB work well
    workers: int = 1  # processes that prepare in the workdir
    max_malformed: int = 0  # malformed records of a split that are skipped; one more stops the run

    def __post_init__(self):
        if self.shard_size < 2:
            raise ValueError(f"data.shard_size={self.shard_size}: must be at least 2")
        if self.workers < 1:
            raise ValueError(f"data.workers={self.workers}: must be at least 1")
        if self.max_malformed < 0:
            raise ValueError(f"data.max_malformed={self.max_malformed}: give a count, or 0 for none")

    @abc.abstractmethod
    def open_source(self) -> Any:
        """Open the source; its `fingerprint` changes with its content.

        Raises:
          UserError: it cannot be read.
        """

    @abc.abstractmethod
    def row_knobs(self) -> Sequence[str]:
        """Return the names of the knobs that determine the rows."""

    @abc.abstractmethod
    def streams(self, source: Any) -> Sequence[Stream]:
        """Return the source's records in blocks."""

    @abc.abstractmethod
    def rows(self, stream: Stream, number: int, records: Iterator[Any], tools: Any, tally: Tally) -> Iterator[bytes]:
        """Yield the rows of shard `number` of a stream from its records, without malformed ones.

        Raises:
          UserError: the records cannot be used.
        """

    @abc.abstractmethod
    def row_decoder(self, split: Split, folder: epath.Path, manifest: Manifest) -> Callable[[bytes], Example]:
        """Return the function, picklable, that decodes a row of a split to an example."""

    def ingredients(self, cache: epath.Path, source: Any) -> Ingredients:
        """Return what all shards need; make it in `cache` if it is missing."""
        del cache, source
        return Ingredients()

    def tools(self, ingredients: Ingredients) -> Any:
        """Return the tools for `rows`; each worker makes them once from the ingredients."""
        return ingredients

    def summary(self, folder: epath.Path, manifest: Manifest) -> dict[str, Any]:
        """Return further entries for the manifest; "ranges" limits a split to some rows of its shards.

        Raises:
          UserError: there are too few rows.
        """
        del folder, manifest
        return {}

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the rows of a given source; JSON values."""
        return {"format": self.version} | {name: getattr(self, name) for name in self.row_knobs()}

    def prepare(self, cache: str | os.PathLike[str]) -> None:
        """Make the missing rows in `cache`; with `prepared`, check the existing ones.

        One process calls it, before any reads. Finished shards survive a failure. Skipped malformed records are
        reported on stderr, also if the rows exist already.

        Raises:
          UserError: the source or the prepared rows cannot be used, or a split has more than `max_malformed` malformed
            records.
        """
        if self.prepared:
            self.report(*self.manifest(cache))
        else:
            run(self, paths.of(cache), workers=self.workers)

    def manifest(self, cache: str | os.PathLike[str]) -> tuple[epath.Path, Manifest]:
        """Return the folder of the rows and its manifest.

        Raises:
          UserError: nothing is prepared for these settings, or files are missing.
        """
        if self.prepared:
            return manifests.find(paths.of(self.prepared), self.settings())
        folder = self.folder(paths.of(cache), self.open_source())
        if not (folder / manifests.NAME).exists():
            raise UserError(
                f"{cache}: holds no rows of {self.settings()['source']} for these settings; call prepare first"
            )
        return folder, manifests.read(folder)

    def folder(self, cache: epath.Path, source: Any) -> epath.Path:
        """Return the folder for the rows of a source, named by a hash of the settings and the source."""
        return cache / f"rows-{manifests.digest(self.identity(source))}"

    def identity(self, source: Any) -> dict[str, Any]:
        """Return the settings and the source's fingerprint."""
        return self.settings() | {"fingerprint": source.fingerprint}

    def examples(self, split: Split, cache: str | os.PathLike[str]) -> Source:
        """Return the rows of a split in the order of the source: random access, picklable.

        Raises:
          UserError: nothing is prepared for these settings in `cache`.
        """
        folder, manifest = self.manifest(cache)
        start, stop = manifest.get("ranges", {}).get(split, (0, None))
        files, counts = manifests.of_split(folder, manifest, split)
        return shards.ShardRows(files, counts, self.row_decoder(split, folder, manifest), start, stop)

    def fingerprint(self, cache: str | os.PathLike[str]) -> str:
        """Return a hash of the rows of both splits; copying, touching or preparing again does not change it.

        Raises:
          UserError: nothing is prepared for these settings in `cache`.
        """
        return self.manifest(cache)[1]["content"]

    def report(self, folder: epath.Path, manifest: Manifest) -> None:
        """Print to stderr which records were skipped or dropped.

        Raises:
          UserError: more records are malformed than `max_malformed` allows.
        """
        del folder
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
    folder = data.folder(cache, source)
    if (folder / manifests.NAME).exists():
        manifest = manifests.read(folder)
        if not manifests.missing(folder, manifest):
            data.report(folder, manifest)
            return manifest
    ingredients = data.ingredients(cache, source)
    own = [Worker(process * workers + worker, processes * workers) for worker in range(workers)]
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that has started JAX may hang
    counters: Any = spawn.RawArray("d", FIELDS * workers)
    progress = ProgressLines(data.noun, counters)
    try:
        with progress:
            if workers == 1:
                _make_shards(data, folder, ingredients, own[0], counters, 0)
            else:
                jobs = [(data, folder, ingredients, worker, counters, place) for place, worker in enumerate(own)]
                run_in_processes(spawn, _make_shards, jobs)
        manifest = _join(data, folder, ingredients, source)
    except BaseException:
        _remove_empty(folder)
        raise
    if manifest is not None:
        for name, total in manifest["splits"].items():
            counted = ", ".join(f"{count:,} {noun}" for noun, count in total.items() if isinstance(count, int))
            print(f"prepared {name}: {counted}", file=sys.stderr)
        print(progress.summary(), file=sys.stderr, flush=True)
        data.report(folder, manifest)
    return manifest


def _make_shards(
    data: Preparable,
    folder: epath.Path,
    ingredients: Ingredients,
    worker: Worker,
    counters: MutableSequence[float],
    place: int,
) -> None:
    """Make the missing shards of a worker, whose counters are number `place`."""
    source, tools = data.open_source(), data.tools(ingredients)
    streams = data.streams(source)
    counter, there = WorkerCounter(counters, place, streams), _names(folder)
    totals: dict[Split | None, Rejects] = {}
    for stream_number, stream in enumerate(streams):
        if not stream.one_worker or worker.owns(stream, stream_number, 0):
            count = 0
            for number, records in enumerate(stream.blocks()):
                count = number + 1
                name = f"{stream.name}-{number:05}"
                if not worker.owns(stream, stream_number, number) or {f"{name}.json", f"{name}{_ROWS}"} <= there:
                    continue
                tally = Tally(data.max_malformed)
                usable = tally.rejects.sift(counter.records(stream, records))
                rows = counter.rows(data.rows(stream, number, usable, tools, tally))
                written = shards.write(folder / f"{name}{_ROWS}", rows)
                note = {
                    "file": f"{name}{_ROWS}",
                    "split": stream.split,
                    **written._asdict(),
                    "tokenizer": ingredients.sha256,
                    "counts": dict(tally.counts),
                    "dropped": dict(tally.dropped),
                    "malformed": tally.rejects.to_json(),
                }
                paths.write_text(folder / f"{name}.json", manifests.to_text(note))
                totals[stream.split] = tally.rejects.after(totals.get(stream.split, Rejects(0)))
                totals[stream.split].refuse_excess()
            paths.write_text(folder / f"{stream.name}.json", manifests.to_text({"shards": count}))
        counter.finish(stream)


def _join(data: Preparable, folder: epath.Path, ingredients: Ingredients, source: Any) -> Manifest | None:
    """Write and return the manifest of all shards; None if some are missing."""
    there = _names(folder)
    notes: list[dict[str, Any]] = []
    for stream in data.streams(source):
        if f"{stream.name}.json" not in there:
            return None
        for number in range(manifests.read(folder, f"{stream.name}.json")["shards"]):
            name = f"{stream.name}-{number:05}"
            if not {f"{name}.json", f"{name}{_ROWS}"} <= there:
                return None
            notes.append(manifests.read(folder, f"{name}.json"))
    others = [note["file"] for note in notes if note["tokenizer"] != ingredients.sha256]
    if others:
        raise UserError(f"{folder / others[0]}: was made with another tokenizer. Delete {folder} and prepare again.")
    path = epath.Path(ingredients.tokenizer)
    beside = path.name if ingredients.tokenizer and path.parent == folder.parent else ""
    manifest: Manifest = {
        "settings": data.identity(source),
        "versions": {library: importlib.metadata.version(library) for library in _LIBRARIES},
        "tokenizer": {"file": beside, "sha256": ingredients.sha256},
        "splits": manifests.totals(data.max_malformed, notes),
        "shards": [{key: note[key] for key in ("file", "split", "rows", "bytes", "content")} for note in notes],
    }
    manifest |= data.summary(folder, manifest)
    content = [[note["split"], note["rows"], note["content"]] for note in notes]
    manifest["content"] = manifests.digest([ingredients.sha256, content, manifest.get("ranges")])
    paths.write_text(folder / manifests.NAME, manifests.to_text(manifest))
    for name in there:
        if name.endswith(".partial"):  # left by a killed process: every shard exists without it
            (folder / name).unlink(missing_ok=True)
    return manifest


def _names(folder: epath.Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def _remove_empty(folder: epath.Path) -> None:
    if paths.is_local(folder):
        for path in itertools.islice((folder, *folder.parents), 2):
            with contextlib.suppress(OSError):  # missing, or not empty
                os.rmdir(path)
