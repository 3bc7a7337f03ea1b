"""Click logs in Criteo's form: parsed once into the cache, then read by row at random."""

import concurrent.futures
import dataclasses
import glob
import hashlib
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ..errors import UserError
from ..workdir import read_json
from . import click_rows, click_sources, packing, samples
from .click_rows import ClickRows, Fields, Progress
from .records import Malformed, Rejects
from .splits import SPLITS, Split

# Part of every cache name: raise it when the meaning of cached files changes.
_CACHE_FORMAT = 1


class _Part(NamedTuple):
    """A source file, None for the sample; its split, None where a file's rows belong to both."""

    split: Split | None
    path: Path | None

    @property
    def title(self) -> str:
        return f"{self.path.name if self.path else 'flights'}, {self.split or 'train and heldout'}"

    def rows(self) -> Iterator[Fields | Malformed]:
        if self.path is not None:
            return click_sources.criteo(self.path)
        assert self.split is not None
        return click_sources.flights(self.split)


@dataclasses.dataclass(frozen=True)
class ClickData:
    """Criteo's Kaggle set (train.txt) or terabyte (day_0 to day_23), or the vendored flights in the same form.

    The cache holds `clicks-HASH/`, named by a hash of the settings and of the source: one ArrayRecord file for each
    source file, 157 bytes a row, and `stamp.json`.
    """

    source: str = "sample:flights"  # or "file:/path/train.txt", "file:/path/day_*.gz"; of train and held-out together
    heldout_files: str = ""  # glob of those files whose rows are held out, "day_23*"; "" holds out the last rows
    heldout_fraction: float = 1 / 7  # of all rows, at the end, where no files are held out; one of Kaggle's seven days
    max_malformed: int = 0  # rows that may be skipped; 0, so that nobody's data shrink unasked
    workers: int = 1  # processes that parse files, each one at a time; 24 for the terabyte, on as many cores

    def __post_init__(self):
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
        if self.max_malformed < 0:
            raise ValueError(f"data.max_malformed is {self.max_malformed}; give a count, or 0 for none")
        if self.workers < 1:
            raise ValueError(f"data.workers is {self.workers}; it must be at least 1")

    @property
    def tokens_per_example(self) -> int:
        """An example counts as one."""
        return 1

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of an example; see `click_rows.spec`."""
        return click_rows.spec()

    def prepare(self, cache: Path) -> None:
        """Parse the source into `cache`, unless that is done already; one process calls it, before any reads.

        Streams the source; a failure leaves nothing behind. Malformed rows are skipped; how many, and the first few, is
        said on stderr, also where the rows are there already.

        Raises:
          UserError: the source cannot be read, has no rows for one of the splits or more than `max_malformed`
            malformed ones.
        """
        parts = self._parts()
        path = self._path(cache, parts)
        if path.exists():
            rejects = self._stamp(path)[1]
            rejects.refuse_excess()
        else:
            rejects = Rejects(self.max_malformed)
            with packing.AtomicDirectory(path) as partial:
                files = []
                for file, found in self._parsed(parts, partial):
                    files.append(file)
                    rejects = found.after(rejects)
                    rejects.refuse_excess()
                self._check(files)
                contents = [(file["split"], file["rows"], file["content"]) for file in files]
                content = _hash([contents, [self._range(split, files) for split in SPLITS]])
                stamp = {"settings": self._settings(parts), "content": content, "files": files}
                packing.write_json(partial / "stamp.json", stamp | {"malformed": rejects.to_json()})
        if rejects.count:
            print(f"{self.source}: {rejects}, skipped", file=sys.stderr, flush=True)

    def examples(self, split: Split, cache: Path) -> ClickRows:
        """The examples of a split, in the source's order; random access, picklable.

        Raises:
          UserError: nothing is prepared for these settings in `cache`.
        """
        path = self._prepared(cache)
        files = self._stamp(path)[2]
        own = [file for file in files if file["split"] in (split, None)]
        counts = [file["rows"] for file in own]
        return ClickRows([path / file["name"] for file in own], counts, *self._range(split, files))

    def fingerprint(self, cache: Path) -> str:
        """Hash of the rows of both splits: files that were copied, touched or parsed anew do not change it.

        Raises:
          UserError: nothing is prepared for these settings in `cache`.
        """
        return self._stamp(self._prepared(cache))[0]

    def _parsed(self, parts: Sequence[_Part], directory: Path) -> Iterator[tuple[dict[str, Any], Rejects]]:
        """What `_parse` gives for each part, in order."""
        tasks = [
            (part, directory / f"{number:05}.array_record", self.max_malformed) for number, part in enumerate(parts)
        ]
        if self.workers == 1 or len(tasks) == 1:
            yield from (_parse(*task) for task in tasks)
            return
        # A fork of a process that has started JAX may hang.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(self.workers, context) as pool:
            running = [pool.submit(_parse, *task) for task in tasks]
            try:
                yield from (future.result() for future in running)
            finally:
                pool.shutdown(cancel_futures=True)

    def _range(self, split: Split, files: Sequence[dict[str, Any]]) -> tuple[int, int]:
        """Which rows of the split's files are the split's own."""
        total = sum(file["rows"] for file in files if file["split"] in (split, None))
        if all(file["split"] for file in files):
            return 0, total
        boundary = total - round(total * self.heldout_fraction)
        return (0, boundary) if split == "train" else (boundary, total)

    def _check(self, files: Sequence[dict[str, Any]]) -> None:
        for split in SPLITS:
            start, stop = self._range(split, files)
            if start == stop:
                rows = sum(file["rows"] for file in files)
                raise UserError(
                    f"{self.source} has {rows} usable rows and none for the {split} split; give more, or set "
                    "data.heldout_fraction or data.heldout_files"
                )

    def _parts(self) -> list[_Part]:
        kind, _, pattern = self.source.partition(":")
        if kind == "sample":
            return [_Part(split, None) for split in SPLITS]
        paths = _files("data.source", pattern)
        if not self.heldout_files:
            return [_Part(None, path) for path in paths]
        # A bare name means a file beside the others.
        heldout = set(_files("data.heldout_files", os.path.join(os.path.dirname(pattern), self.heldout_files)))
        return [
            _Part("heldout" if path in heldout else "train", path) for path in sorted({*paths} | heldout, key=_numbered)
        ]

    def _settings(self, parts: Sequence[_Part]) -> dict[str, Any]:
        """What decides the content of the rows; `max_malformed` only decides whether there are any."""
        if self.source.startswith("sample:"):
            found: Any = samples.sha256(click_sources.FLIGHTS)
        else:
            stats = [(str(part.path), os.stat(str(part.path)), part.split) for part in parts]
            found = _hash([(path, stat.st_size, stat.st_mtime_ns, split) for path, stat, split in stats])
        return {
            "format": _CACHE_FORMAT,
            "source": self.source,
            "fingerprint": found,
            "heldout_files": self.heldout_files,
            "heldout_fraction": self.heldout_fraction,
        }

    def _path(self, cache: Path, parts: Sequence[_Part]) -> Path:
        return cache / f"clicks-{_hash(self._settings(parts))}"

    def _prepared(self, cache: Path) -> Path:
        path = self._path(cache, self._parts())
        if not path.exists():
            raise UserError(f"{cache} holds no rows for {self.source} with these settings; call prepare first")
        return path

    def _stamp(self, path: Path) -> tuple[str, Rejects, list[dict[str, Any]]]:
        """What `prepare` has noted: the hash of the content, what was skipped, and the files."""
        try:
            stamp = read_json(path / "stamp.json") or {}
            rejects = Rejects(self.max_malformed, **stamp["malformed"])
            files = [{"name": str(f["name"]), "split": f["split"], "rows": int(f["rows"])} for f in stamp["files"]]
            return stamp["content"], rejects, files
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}/stamp.json is damaged; remove {path}, and it is made again") from error


def _parse(part: _Part, path: Path, limit: int) -> tuple[dict[str, Any], Rejects]:
    """Write a part's rows to `path`; what the stamp says of the file, and what was malformed."""
    rejects = Rejects(limit)
    progress = Progress(part.title, rejects)
    written = click_rows.write(path, rejects.sift(part.rows()), progress)
    progress.finish()
    return {"name": path.name, "split": part.split} | written._asdict(), rejects


def _files(knob: str, pattern: str) -> list[Path]:
    """The files that a glob matches, by number where their names have one: day_10 comes after day_9."""
    found = [Path(match) for match in glob.glob(os.path.expanduser(pattern)) if os.path.isfile(match)]
    if not found:
        raise UserError(f"{knob} {pattern!r} matches no file; check the path")
    for path in found:
        if not os.access(path, os.R_OK):
            raise UserError(f"data file {path} cannot be read; check its permissions (chmod +r)")
    return sorted(found, key=_numbered)


def _numbered(path: Path) -> list[str]:
    """A key that sorts numbers in names by their size."""
    return [text.zfill(20) if text.isdecimal() else text for text in re.split("([0-9]+)", str(path))]


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
