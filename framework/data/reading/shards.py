"""Rows as bytes in ArrayRecord files: a shard is written once in order; rows of many shards are read at random.

Rows are stored in uncompressed groups of up to 64: reading one costs 10 to 50 microseconds of a core, with the groups
of one that grain asks for 200 and more. One call reads all wanted rows of a shard. ArrayRecord keeps a checksum of each
group: corrupt rows are refused.
"""

import bisect
import collections
import functools
import hashlib
import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from ...base import paths
from ...base.errors import UserError
from ...dataset import Example

Decode = Callable[[Sequence[bytes]], Sequence[Example]]

SUFFIX = ".array_record"
_GROUP_BYTES, _LEAST, _MOST = 10_240, 8, 64  # size of a group in bytes; bounds of its number of rows
_OPEN = 512  # readers held open; each takes one of the process' file descriptors, often 1,024


def write(path: epath.Path, rows: Iterable[bytes]) -> dict[str, Any]:
    """Stream rows to a file that appears only when complete, and return their number, their hash and its size.

    A file in a bucket is written locally and then copied.

    Raises:
      OSError: the file cannot be written.
    """
    folder = Path(path.parent) if paths.is_local(path) else Path(tempfile.mkdtemp())
    partial = folder / f".{path.name}.{os.getpid()}.partial"
    try:
        count, content = _written(partial, rows)
        size = partial.stat().st_size
        if paths.is_local(path):
            partial.replace(path)
        else:
            with partial.open("rb") as here, path.open("wb") as there:
                shutil.copyfileobj(here, there, 1 << 20)
    finally:
        partial.unlink(missing_ok=True)
        if not paths.is_local(path):
            folder.rmdir()
    return {"rows": count, "content": content, "bytes": size}


def _written(path: Path, rows: Iterable[bytes]) -> tuple[int, str]:
    count, content = 0, hashlib.sha256()
    rows = iter(rows)
    head = list(itertools.islice(rows, 1))
    group = max(_LEAST, min(_MOST, _GROUP_BYTES // max(len(head[0]), 1))) if head else _MOST
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = _writing(ArrayRecordWriter, str(path), f"group_size:{group},uncompressed")
    try:
        for row in itertools.chain(head, rows):
            _writing(writer.write, row)
            content.update(len(row).to_bytes(4, "little") + row)
            count += 1
    finally:
        _writing(writer.close)
    return count, content.hexdigest()


def _writing(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except RuntimeError as error:  # a full disk, for example
        raise OSError(str(error)) from None


def rows_of(columns: Mapping[str, np.ndarray]) -> list[Example]:
    """Return the examples of arrays [rows, ...], as views."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class Columns:
    """A decoder of rows that makes arrays of many examples at once.

    Args:
      arrays: returns the arrays [rows, ...] of rows, by name.
    """

    def __init__(self, arrays: Callable[[Sequence[bytes]], dict[str, np.ndarray]]):
        self.arrays = arrays

    def __call__(self, contents: Sequence[bytes]) -> list[Example]:
        """Return the examples of rows."""
        return rows_of(self.arrays(contents))


class ShardRows:
    """Random access to rows `start` to `stop` of concatenated shards.

    Args:
      shards: files of `write`, local or gs://, with their numbers of rows.
      decode: returns the examples of rows.
      start, stop: bounds as of a slice.
    """

    in_workers = True

    def __init__(self, shards: Mapping[Any, int], decode: Decode, start: int, stop: int):
        self._shards, self._counts, self._decode = list(map(os.fspath, shards)), list(shards.values()), decode
        self._ends = list(itertools.accumulate(self._counts))
        self._range = range(start, stop)
        self._reader = functools.lru_cache(_OPEN)(self._open)  # a dropped reader closes once no thread reads from it
        assert 0 <= start <= stop <= sum(self._counts), (start, stop, self._counts)

    def __repr__(self) -> str:
        return f"ShardRows({self._shards[:1]}, {self._range})"

    def __len__(self) -> int:
        return len(self._range)

    def __reduce__(self) -> tuple[Any, ...]:
        shards = dict(zip(self._shards, self._counts, strict=True))
        return type(self), (shards, self._decode, self._range.start, self._range.stop)

    def __getitem__(self, index: int) -> Example:
        """Return an example; raises as `__getitems__`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Example]:
        """Return examples, in the order of their indices.

        Raises:
          UserError: a shard cannot be read, or has another number of rows than its manifest says.
        """
        return self._decode(self._contents(indices))

    @property
    def stacked(self) -> Callable[[Sequence[int]], dict[str, np.ndarray]] | None:
        """Return the function from indices to arrays of their examples, or None; it raises as `__getitems__`."""
        decode = self._decode
        return (lambda indices: decode.arrays(self._contents(indices))) if isinstance(decode, Columns) else None

    def _contents(self, indices: Sequence[int]) -> list[bytes]:
        wanted = collections.defaultdict[int, list[int]](list)  # places in `contents` by shard
        rows, contents = [], [b""] * len(indices)
        for number, index in enumerate(indices):
            place = self._range[index]
            shard = bisect.bisect_right(self._ends, place)
            rows.append(place - self._ends[shard] + self._counts[shard])
            wanted[shard].append(number)
        for shard, numbers in wanted.items():
            for number, content in zip(numbers, self._read(shard, [rows[number] for number in numbers]), strict=True):
                contents[number] = content
        return contents

    def _read(self, shard: int, rows: list[int]) -> list[bytes]:
        try:
            return self._reader(shard).read(rows)
        except (RuntimeError, IndexError) as error:
            if len(rows) > 1:  # find the one to name
                return [content for row in rows for content in self._read(shard, [row])]
            raise UserError(
                f"{self._shards[shard]}, row {rows[0] + 1}: cannot be read ({str(error)[:80]}). {_REBUILD}"
            ) from None

    def _open(self, shard: int) -> ArrayRecordReader:
        reader = ArrayRecordReader(_here(self._shards[shard]), "readahead_buffer_size:0")
        found, expected = reader.num_records(), self._counts[shard]
        if found != expected:
            raise UserError(f"{self._shards[shard]}: has {found} rows, its manifest says {expected}. {_REBUILD}")
        return reader


_REBUILD = "Delete it and rerun shampax prepare, or the run, to rebuild it."


def _here(path: str) -> str:
    """Return a file as this machine has it: ArrayRecord reads no buckets. A copy is kept, named by path and state."""
    if paths.is_local(path):
        return path
    there = epath.Path(path)
    state = f"{path} {there.stat().length} {paths.modified(there)}"
    copy = Path(paths.cache_folder() / "rows" / f"{hashlib.sha256(state.encode()).hexdigest()[:24]}-{there.name}")
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f".{copy.name}.{os.getpid()}.{threading.get_ident()}.partial")
        try:
            with there.open("rb") as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            partial.replace(copy)
        finally:
            partial.unlink(missing_ok=True)
    return str(copy)
