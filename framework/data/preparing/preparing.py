"""Preparing: make the records of a source into shards of rows, once, for all data sets that need it.

A shard depends only on the source, the settings and its number. Workers and processes therefore divide shards by number
without communicating; whichever process finds all shards done writes the manifest, always with the same bytes; and a
preparation that was killed continues with the missing shards.
"""

import abc
import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import multiprocessing
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from multiprocessing.connection import Connection
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
from .windows import Windows
from .workers import run_in_processes

_TRAIN_PER_HELDOUT = 9  # rows of each, where preparing stops early
_TRAIN_PER_HELDOUT_WINDOW = 4  # shards of the first window / held-out shards, where training starts early
_BYTES_PER_SECOND, _BYTES_PER_TOKEN = 1.5e6, 4  # of text that one core makes rows of; about


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
    shuffle_window: Annotated[int, Within(0, 2**16)] = 0  # shards shuffled together; training needs the first; 0: all
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
        settings = {"format": self.version} | {name: getattr(self, name) for name in names}
        return settings if self.shuffle_window else {k: v for k, v in settings.items() if k != "shuffle_window"}

    @property
    def grows(self) -> bool:
        """Whether training starts before all rows are made."""
        return self.shuffle_window > 0

    def prepare(self, cache: str | os.PathLike[str]) -> None:
        """Make the missing rows in `cache`; with `prepared`, check the existing ones.

        One process calls it, before any reads. Finished shards survive a failure. Skipped malformed records are
        reported on stderr, also if the rows exist already.

        Raises:
          UserError: the source or the prepared rows cannot be used, or a split has more than `max_malformed` malformed
            records.
        """
        self.prepare_some(cache, 0, 0)

    def prepare_some(self, cache: str | os.PathLike[str], examples: int, seconds: float) -> None:
        """Make rows as `prepare`, but stop after `examples` training rows, if it is not 0; existing ones are enough.

        With `shuffle_window`, make the held-out rows and the first window; `ahead` makes the others.

        Raises:
          UserError: see `prepare`; the work takes longer than `seconds`, if it is not 0.
        """
        if self.prepared:
            self.report(self.manifest(cache)[1])
        else:
            started = self.grows
            run(self, paths.of(cache), workers=self.workers, most=examples, seconds=seconds, started=started)

    @contextlib.contextmanager
    def ahead(self, cache: str | os.PathLike[str], examples: int) -> Iterator[Callable[[], str]]:
        """With `shuffle_window`, make rows in the background, up to `examples`, until the context ends.

        Yields:
          A function that returns why no further rows are made, "" while they are or if all exist.
        """
        failures: list[str] = []
        if self.prepared or not self.grows:
            yield lambda: ""
            return
        ended, end = multiprocessing.Pipe(duplex=False)
        options: dict[str, Any] = {"workers": self.workers, "most": examples, "extend": True, "until": ended}
        arguments = (failures, self, paths.of(cache), options)
        thread = threading.Thread(target=_run_or_tell, args=arguments, daemon=True)
        thread.start()
        try:
            yield lambda: "".join(failures)
        finally:
            end.send(None)
            thread.join()

    def manifest(self, cache: str | os.PathLike[str]) -> tuple[epath.Path, Manifest]:
        """Return the folder of the rows and its manifest.

        Raises:
          UserError: nothing is prepared for these settings, or files are missing.
        """
        if self.prepared:
            return manifests.find(paths.of(self.prepared), self.settings())
        folder = _folder(self, paths.of(cache), self.open_source())
        whole = (folder / manifests.NAME).exists()
        if not whole and not (self.grows and (folder / manifests.STARTED).exists()):
            raise UserError(
                f"{cache}: holds no rows of {self.settings()['source']} for these settings; call prepare first"
            )
        return folder, manifests.read(folder, manifests.NAME if whole else manifests.STARTED)

    def identity(self, source: sources.Source) -> dict[str, Any]:
        """Return the settings and the source's fingerprint."""
        return self.settings() | {"fingerprint": source.fingerprint}

    def examples(self, split: Split, cache: str | os.PathLike[str]) -> Source:
        """Return random access to the rows of a split in the order of the source; raises as `manifest`."""
        folder, manifest = self.manifest(cache)
        files, decode = manifests.of_split(folder, manifest, split), self.row_decoder(split, folder, manifest)
        if self.grows and split == "train":
            wanted = 0 if self.prepared else manifests.read(folder, manifests.STARTED)["wanted"]
            ended = self.prepared or not manifest["stopped"] or 0 < wanted <= sum(files.values())
            making = not ended or bool(not self.prepared and manifests.missing(folder, manifest))
            known = [] if making else [*files.values()]
            return Windows(folder, decode, self.shuffle_window, known, making=making, wanted=wanted)
        return shards.ShardRows(files, decode, *manifest["ranges"][split])

    def fingerprint(self, cache: str | os.PathLike[str]) -> str:
        """Return a hash of the rows of both splits, which copying or preparing again keeps; raises as `manifest`.

        With `shuffle_window` it is one of the settings, the source and the tokenizer.
        """
        manifest = self.manifest(cache)[1]
        if self.grows:
            return manifests.digest([manifest["settings"], manifest["tokenizer"]["sha256"]])
        return manifest["content"]

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


def run(
    data: Preparable,
    cache: epath.Path,
    *,
    workers: int,
    process: int = 0,
    processes: int = 1,
    most: int = 0,
    seconds: float = 0,
    extend: bool = False,
    started: bool = False,
    until: Connection | None = None,
) -> Manifest | None:
    """Make this process' missing shards, and the manifest once all shards exist.

    With `most`, the rows are those of the first shards that hold so many training rows, for any number of workers; of
    the first windows with `data.shuffle_window`.

    Args:
      data: the data set to prepare.
      cache: folder that may hold several preparations.
      workers: number of worker processes.
      process: index of this process.
      processes: number of processes, on this host or others, at once or one after another.
      most: training rows after which to stop, with a proportional part of the held-out rows; 0 makes all.
      seconds: refuse work that takes longer; 0 for any.
      extend: whether to add rows to fewer than `most` that were made before.
      started: make the held-out rows and the first window only, and `manifests.STARTED`.
      until: makes rows in the background until something can be received from this end of a pipe.

    Returns:
      The manifest; None if shards of other processes are missing, or `until` has ended the work.

    Raises:
      UserError: see `Preparable.prepare`.
    """
    source = data.open_source()
    folder, name = _folder(data, cache, source), manifests.STARTED if started else manifests.NAME
    limits = _limits(data, source, most, started)
    if (folder / name).exists():
        manifest = manifests.read(folder, name)
        enough = not (extend and manifest["stopped"]) or 0 < most <= manifest["ranges"]["train"][1]
        if started:
            enough = most <= manifest["wanted"]
        if enough and not manifests.missing(folder, manifest):
            data.report(manifest)
            return manifest
    if not started:
        _refuse_long(data, source, workers, most, seconds)
    try:
        tokenizer = data.make_tokenizer(cache, source)
        first, every = process * workers, processes * workers
        jobs = [(data, folder, tokenizer, limits, first + worker, every) for worker in range(workers)]
        # Workers estimate the rows of shards that others are making. If these turn out too few, they make more.
        while (manifest := _join(data, folder, tokenizer, source, limits, name, most)) is None:
            if workers == 1 and until is None:
                _make_shards(*jobs[0])
            elif not run_in_processes(_make_shards, jobs, folder, until):
                break
            if processes > 1:
                manifest = _join(data, folder, tokenizer, source, limits, name, most)
                break
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}). Free disk space or choose another folder, and "
            "rerun the command; finished shards are kept."
        ) from error
    if manifest is not None:
        for name, total in manifest["splits"].items():
            counted = ", ".join(f"{count:,} {noun}" for noun, count in total.items() if isinstance(count, int))
            print(f"prepared {name}: {counted}", file=sys.stderr, flush=True)
        if started:
            print("training can start; further rows are made while it runs", file=sys.stderr, flush=True)
        elif manifest["stopped"]:
            print(f"stopped at {most:,} training rows, which is enough for the run", file=sys.stderr, flush=True)
        data.report(manifest)
    return manifest


def _run_or_tell(failures: list[str], data: Preparable, cache: epath.Path, options: dict[str, Any]) -> None:
    """Run; if it fails, add why to `failures` and write it on stderr."""
    try:
        run(data, cache, **options)
    except Exception as error:
        told = str(error) if isinstance(error, UserError) else repr(error)
        failures.append(f"the rows of later steps cannot be made: {told}")
        print(f"warning: {failures[0]}", file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class _Limit:
    """Where a stream may stop.

    Attributes:
      shards: before this shard.
      rows: before a shard whose number is a multiple of `window`, once the shards before it have so many rows.
      window: see `rows`.
    """

    shards: float = math.inf
    rows: float = math.inf
    window: int = 1


def _limits(data: Preparable, source: sources.Source, most: int, started: bool) -> dict[str, _Limit]:
    """Return where each stream may stop, by its name; nothing for sources that cannot be divided so.

    The held-out rows that are made for windows do not depend on `most`, so that a longer run has the same.
    """
    splits, window = [stream.split for stream in source.streams], data.shuffle_window
    divided = None not in splits and len(set(splits)) == len(splits)
    if window and not divided:
        raise UserError(f"data.shuffle_window={window}: the files of {type(data).__name__} are prepared whole. Use 0.")
    if window:
        train = _Limit(shards=window) if started else _Limit(rows=most or math.inf, window=window)
        heldout = _Limit(shards=-(-window // _TRAIN_PER_HELDOUT_WINDOW))
    elif most and divided:
        train, heldout = _Limit(rows=most), _Limit(rows=most // _TRAIN_PER_HELDOUT + 1)
    else:
        return {}
    return {stream.name: train if stream.split == "train" else heldout for stream in source.streams}


def _refuse_long(data: Preparable, source: sources.Source, workers: int, most: int, seconds: float) -> None:
    tokens = most * getattr(data, "tokens_per_example", 1)
    size = min(source.text_bytes, tokens * _BYTES_PER_TOKEN) if most else source.text_bytes
    expected = size / (_BYTES_PER_SECOND * workers)
    if not 0 < seconds < expected:
        return
    words = [word for word in sys.argv[1:] if word.startswith("--config")] or ["--config=FILE.py"]
    raise UserError(
        f"data.source={data.settings()['source']}: making its rows takes about {expected / 60:,.0f} minutes with "
        f"data.workers={workers}, and all processes would wait. Make them beforehand: shampax prepare "
        f"{shlex.join(words)} --output=DIR; then train with --config.data.prepared=DIR."
    )


def _make_shards(
    data: Preparable, folder: epath.Path, tokenizer: str, limits: dict[str, _Limit], worker: int, workers: int
) -> None:
    """Make the missing shards of a worker, one of `workers` in all processes, and print a line for each."""
    there, sha256 = _names(folder), _sha256(tokenizer)
    for first, stream in enumerate(data.open_source().streams):
        if stream.one_worker and first % workers != worker:
            continue
        own = functools.partial(_is_own, first, stream.one_worker, worker, workers)
        cursor = _after_finished(folder, stream.name, there, own)
        count, began, known = cursor.block, time.monotonic(), dict[int, int]()
        limit = limits.get(stream.name, _Limit())
        for number, records in enumerate(stream.blocks(cursor), start=count):
            if number >= limit.shards:
                break
            count = number + 1
            name = _name(stream.name, number)
            if not own(number) or _is_there(name, there):
                continue
            first_of_window = number - number % limit.window
            if limit.rows < math.inf and _rows_before(folder, stream.name, first_of_window, known) >= limit.rows:
                break
            tally, begun = Tally(data.max_malformed), time.monotonic()
            rows = data.rows(stream, number, tally.rejects.sift(records), tokenizer, tally)
            written = shards.write(folder / f"{name}{shards.SUFFIX}", rows)
            collections.deque(records, maxlen=0)  # so that the cursor is at the end of the block
            note = {
                "file": f"{name}{shards.SUFFIX}",
                "split": stream.split,
                **written,
                "end": cursor.place,
                "tokenizer": sha256,
                "counts": dict(tally.counts),
                "dropped": dict(tally.dropped),
                "malformed": tally.rejects.to_json(),
            }
            paths.write_text(folder / f"{name}.json", manifests.to_text(note))
            of, now = f" of {stream.shards:05}" if stream.shards else "", time.monotonic()
            rate = f"{note['rows'] / max(now - begun, 1e-3):,.0f} rows/s per core"
            line = f"shard {name}{of}: {note['rows']:,} rows, after {now - began:,.0f} s, {rate}"
            print(line, file=sys.stderr, flush=True)
        else:
            paths.write_text(folder / f"{stream.name}.json", manifests.to_text({"shards": count}))


def _is_own(first: int, one_worker: bool, worker: int, workers: int, number: int) -> bool:
    """Return whether a worker makes a shard of the stream whose first shard is that of worker `first`."""
    return (first if one_worker else first + number) % workers == worker


def _is_there(name: str, there: Collection[str]) -> bool:
    return f"{name}.json" in there and f"{name}{shards.SUFFIX}" in there


def _after_finished(
    folder: epath.Path, stream: str, there: Collection[str], own: Callable[[int], bool]
) -> sources.Cursor:
    """Return where a worker begins to read: after the last finished shard before the first that it has to make."""
    missing = next(n for n in itertools.count() if own(n) and not _is_there(_name(stream, n), there))
    for number in range(missing - 1, -1, -1):
        if _is_there(_name(stream, number), there):
            place = manifests.read(folder, f"{_name(stream, number)}.json").get("end")
            return sources.Cursor(number + 1, place) if place else sources.Cursor()
    return sources.Cursor()


def _name(stream: str, number: int) -> str:
    return f"{stream}-{number:05}"


def _rows_before(folder: epath.Path, stream: str, number: int, known: dict[int, int]) -> float:
    """Return about how many rows the shards before `number` have; `known` keeps those that exist."""
    for each in range(number):
        if each not in known and (folder / f"{_name(stream, each)}.json").exists():
            known[each] = manifests.read(folder, f"{_name(stream, each)}.json")["rows"]
    return sum(known.values()) * number / max(len(known), 1)


def _join(
    data: Preparable,
    folder: epath.Path,
    tokenizer: str,
    source: sources.Source,
    limits: dict[str, _Limit],
    manifest_name: str,
    wanted: int,
) -> Manifest | None:
    """Write and return the manifest of all shards, or of the first that reach the limits; None if some are missing."""
    there = _names(folder)
    notes: list[dict[str, Any]] = []
    stopped = False
    for stream in source.streams:
        whole, rows, limit = f"{stream.name}.json" in there, 0, limits.get(stream.name, _Limit())
        count = manifests.read(folder, f"{stream.name}.json")["shards"] if whole else None
        for number in itertools.count() if count is None else range(count):
            if number >= limit.shards or (rows >= limit.rows and number % limit.window == 0):
                stopped |= stream.split == "train" or limit.rows < math.inf
                break
            name = _name(stream.name, number)
            if not _is_there(name, there):
                return None
            notes.append(manifests.read(folder, f"{name}.json"))
            rows += notes[-1]["rows"]
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
        "stopped": stopped,
    }
    if manifest_name == manifests.STARTED:
        manifest["wanted"] = wanted
    for split, (start, stop) in ranges.items():
        if start == stop:
            raise UserError(
                f"data.source={data.settings()['source']}: has no usable {data.noun} for the {split} split. "
                "Give more, or set data.heldout_fraction."
            )
    paths.write_text(folder / manifest_name, manifests.to_text(manifest))
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
