"""Preparing: the records of a source made into shards of rows, once; the one mechanism of all data sets that need it.

A shard is a function of the source, the settings and its number. So workers and processes share shards out by number
and need tell each other nothing; whoever finds all of them there writes the manifest, which is the same bytes whoever
does; and what was killed goes on with the shards that are missing.
"""

import abc
import collections
import dataclasses
import importlib.metadata
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from etils import epath

from ...base import paths
from ...base.errors import UserError
from ...dataset import Split
from ..reading.records import Rejects
from . import manifests
from .jobs import ROWS, Ingredients, Job, Share, Tally, names
from .manifests import Manifest
from .progress import Progress
from .streams import Stream
from .workers import work_here, work_in_parallel

_LIBRARIES = ("array-record", "numpy", "tokenizers")  # what rows are made by


@dataclasses.dataclass(frozen=True)
class Preparable(abc.ABC):
    """A data set whose examples are made once: knobs that all of these have, and what each of them says for itself."""

    noun: ClassVar[str]  # what a record is called, in the plural

    prepared: str = ""  # folder that launch.prepare has filled, local or gs://; "" prepares in the workdir
    shard_size: int = 100_000  # records of the source in a shard, at whose end the rows are cut; 0.1 to 1 GB is good
    workers: int = 1  # processes that prepare, where it is done in the workdir
    max_malformed: int = 0  # records of a split that may be skipped; 0, so that nobody's data shrink unasked

    def __post_init__(self):
        if self.shard_size < 2:
            raise ValueError(f"data.shard_size is {self.shard_size}; it must be at least 2")
        if self.workers < 1:
            raise ValueError(f"data.workers is {self.workers}; it must be at least 1")
        if self.max_malformed < 0:
            raise ValueError(f"data.max_malformed is {self.max_malformed}; give a count, or 0 for none")

    @abc.abstractmethod
    def open_source(self) -> Any:
        """The source, whose `fingerprint` changes with its content.

        Raises:
          UserError: it cannot be read.
        """

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides the rows, the content of the source apart; good for JSON."""

    @abc.abstractmethod
    def streams(self, source: Any) -> Sequence[Stream]:
        """The source's records, in blocks."""

    @abc.abstractmethod
    def rows(self, stream: Stream, number: int, records: Iterator[Any], tools: Any, tally: Tally) -> Iterator[bytes]:
        """The rows of shard `number` of a stream, from its records, malformed ones left out already.

        Raises:
          UserError: the records cannot be used.
        """

    def ingredients(self, cache: epath.Path, source: Any) -> Ingredients:
        """What all shards need, made if it is not in `cache` yet."""
        del cache, source
        return Ingredients()

    def tools(self, ingredients: Ingredients) -> Any:
        """What `rows` needs, made of the ingredients once in each worker."""
        return ingredients

    def summary(self, folder: epath.Path, manifest: Manifest) -> dict[str, Any]:
        """What the manifest is to say besides; reads rows if it must.

        Raises:
          UserError: the rows are not enough.
        """
        del folder, manifest
        return {}

    def prepare(self, cache: str | os.PathLike[str]) -> None:
        """Make the rows in `cache`, as far as they are not there; with `prepared`, check those that are there.

        For one process, before any other reads. Streams the source; shards that are finished outlive a failure.
        Malformed records are skipped; how many, and the first few, is said on stderr, also where the rows are there.

        Raises:
          UserError: the source, or what is prepared, cannot be used; or a split has more than `max_malformed`
            malformed records.
        """
        if self.prepared:
            self.say(*self.manifest(cache))
        else:
            run(self, paths.of(cache), workers=self.workers)

    def manifest(self, cache: str | os.PathLike[str]) -> tuple[epath.Path, Manifest]:
        """The folder of the rows, and what is noted of them.

        Raises:
          UserError: nothing is prepared for these settings, or not all of it is there.
        """
        if self.prepared:
            return manifests.find(paths.of(self.prepared), self.settings())
        folder = self.folder(paths.of(cache), self.open_source())
        if not (folder / manifests.NAME).exists():
            raise UserError(
                f"{cache} holds no rows for {self.settings()['source']} with these settings; call prepare first"
            )
        return folder, manifests.read(folder)

    def folder(self, cache: epath.Path, source: Any) -> epath.Path:
        """Where the rows of a source lie: named by what decides them, so that others never meet."""
        return cache / f"rows-{manifests.digest(self._identity(source))}"

    def fingerprint(self, cache: str | os.PathLike[str]) -> str:
        """Hash of the rows of both splits: a source or rows that were copied, touched or made anew do not change it.

        Raises:
          UserError: nothing is prepared for these settings in `cache`.
        """
        return self.manifest(cache)[1]["content"]

    def say(self, folder: epath.Path, manifest: Manifest) -> None:
        """Lines on stderr about what was left out.

        Raises:
          UserError: more is malformed than `max_malformed` allows.
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

    def _identity(self, source: Any) -> dict[str, Any]:
        return self.settings() | {"fingerprint": source.fingerprint}


def run(data: Preparable, cache: epath.Path, *, workers: int, process: int = 0, processes: int = 1) -> Manifest | None:
    """Make the missing shards that fall to this process, and the manifest once all are there.

    Args:
      data: what to prepare.
      cache: where; several preparations may lie in one folder.
      workers: processes that work here.
      process: number of this one.
      processes: how many there are, on this host or others, at one time or one after another.

    Returns:
      The manifest; None where shards of other processes are missing.

    Raises:
      UserError: see `Preparable.prepare`.
    """
    source = data.open_source()
    folder = data.folder(cache, source)
    if (folder / manifests.NAME).exists():
        manifest = manifests.read(folder)
        if not manifests.missing(folder, manifest):
            data.say(folder, manifest)
            return manifest
    ingredients = data.ingredients(cache, source)
    progress = Progress(data.noun, workers, data.max_malformed)
    try:
        job = Job(data, folder, ingredients)
        shares = [Share(process * workers + worker, processes * workers) for worker in range(workers)]
        if workers == 1:
            work_here(job, shares[0], progress)
        else:
            work_in_parallel(job, shares, progress)
        manifest = _join(data, job, source)
    except BaseException:
        _remove_empty(folder)
        raise
    if manifest is not None:
        progress.finish(manifest["splits"])
        data.say(folder, manifest)
    return manifest


def _join(data: Preparable, job: Job, source: Any) -> Manifest | None:
    """The manifest of all shards, written; None where some are missing."""
    folder, there = job.folder, names(job.folder)
    notes: list[dict[str, Any]] = []
    for stream in data.streams(source):
        if f"{stream.name}.json" not in there:
            return None
        for number in range(_read(folder / f"{stream.name}.json")["shards"]):
            name = f"{stream.name}-{number:05}"
            if not {f"{name}.json", f"{name}{ROWS}"} <= there:
                return None
            notes.append(_read(folder / f"{name}.json"))
    tokenizer = job.ingredients.sha256
    others = [note["file"] for note in notes if note["tokenizer"] != tokenizer]
    if others:
        raise UserError(f"{folder / others[0]} is made with another tokenizer; remove {folder} and prepare again")
    manifest: Manifest = {
        "settings": data._identity(source),
        "versions": {library: importlib.metadata.version(library) for library in _LIBRARIES},
        "tokenizer": {"file": _beside(job), "sha256": tokenizer},
        "splits": {name: _total(data, each) for name, each in _by_split(notes)},
        "shards": [{key: note[key] for key in ("file", "split", "rows", "bytes", "content")} for note in notes],
    }
    manifest |= data.summary(folder, manifest)
    content = [[note["split"], note["rows"], note["content"]] for note in notes]
    manifest["content"] = manifests.digest([tokenizer, content, manifest.get("ranges")])
    paths.write_text(folder / manifests.NAME, manifests.to_text(manifest))
    for name in there:
        if name.endswith(".partial"):  # of a process that was killed: every shard is there without it
            (folder / name).unlink(missing_ok=True)
    return manifest


def _beside(job: Job) -> str:
    """The name of a tokenizer that lies beside the rows, "" for none."""
    path = epath.Path(job.ingredients.tokenizer)
    return path.name if job.ingredients.tokenizer and path.parent == job.folder.parent else ""


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged; remove {path.parent}, and it is made again") from error


def _by_split(notes: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    groups: dict[Split | None, list[dict[str, Any]]] = {}
    for note in notes:
        groups.setdefault(note["split"], []).append(note)
    # In the order that people think of them, whichever is made first.
    order = sorted(groups, key=lambda split: split == "heldout")
    return ((split or "train and heldout", groups[split]) for split in order)


def _total(data: Preparable, notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rejects, counts, dropped = Rejects(data.max_malformed), collections.Counter(), collections.Counter()
    for note in notes:
        rejects = Rejects(data.max_malformed, **note["malformed"]).after(rejects)
        counts.update(note["counts"])
        dropped.update(note["dropped"])
    rejects.refuse_excess()
    rows = sum(note["rows"] for note in notes)
    return {**counts, "rows": rows, "dropped": dict(dropped), "malformed": rejects.to_json()}


def _remove_empty(folder: epath.Path) -> None:
    """Leave no empty folders behind."""
    if paths.is_local(folder):
        for path in itertools.islice((folder, *folder.parents), 2):
            if path.exists() and not any(path.iterdir()):
                path.rmdir()
