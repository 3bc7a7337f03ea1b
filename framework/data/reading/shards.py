"""Rows as bytes in ArrayRecord files: a shard is written once in order; rows of many shards are read at random.

Rows are stored in uncompressed groups of up to 64: reading one costs 10 to 50 microseconds of a core, with the groups
of one that grain asks for 200 and more. ArrayRecord keeps a checksum of each group: corrupt rows are refused.
"""

import bisect
import collections
import hashlib
import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from ...base import paths
from ...base.errors import UserError
from ...dataset import Example

_GROUP_BYTES, _LEAST, _MOST = 10_240, 8, 64  # size of a group in bytes; bounds of its number of rows
_OPEN = 512  # readers held open; each takes one of the process' file descriptors, often 1,024
_AT_ONCE = 4_096  # rows read at once


class Written(NamedTuple):
    """The result of `write`: number of rows, their hash, and the size of the file."""

    rows: int
    content: str
    bytes: int


def write(path: epath.Path, rows: Iterable[bytes]) -> Written:
    """Stream rows to a file that appears only when complete; a file in a bucket is written locally and then copied."""
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
    return Written(count, content, size)


def _written(path: Path, rows: Iterable[bytes]) -> tuple[int, str]:
    count, content = 0, hashlib.sha256()
    rows = iter(rows)
    head = list(itertools.islice(rows, 1))
    group = max(_LEAST, min(_MOST, _GROUP_BYTES // max(len(head[0]), 1))) if head else _MOST
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), f"group_size:{group},uncompressed")
    try:
        for row in itertools.chain(head, rows):
            writer.write(row)
            content.update(len(row).to_bytes(4, "little") + row)
            count += 1
    finally:
        writer.close()
    return count, content.hexdigest()


class ShardRows:
    """Random access to rows `start` to `stop` of concatenated shards; picklable.

    Args:
      shards: files of `write`, local or gs://.
      counts: number of rows of each shard.
      decode: returns the example of a row.
      start, stop: bounds as of a slice; all rows by default.
    """

    def __init__(
        self,
        shards: Sequence[epath.Path],
        counts: Sequence[int],
        decode: Callable[[bytes], Example],
        start: int = 0,
        stop: int | None = None,
    ):
        held = [(os.fspath(shard), count) for shard, count in zip(shards, counts, strict=True) if count]
        self._shards, self._decode = tuple(shard for shard, _ in held), decode
        self._ends = tuple(itertools.accumulate(count for _, count in held))
        total = self._ends[-1] if self._ends else 0
        self._range = range(start, total if stop is None else stop)
        assert 0 <= self._range.start <= self._range.stop <= total, (start, stop, counts)

    @cached_property
    def _readers(self) -> "_Readers":
        return _Readers(self._shards, self._ends)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_readers"}

    def __repr__(self) -> str:
        return f"ShardRows({os.path.dirname(self._shards[0]) if self._shards else 'nothing'}, {self._range})"

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> Example:
        place = self._range[index]
        shard = bisect.bisect_right(self._ends, place)
        return self._decode(self._readers.read(shard, [place - (self._ends[shard - 1] if shard else 0)])[0])

    def raw(self) -> Iterator[bytes]:
        """Yield the bytes of all rows in order."""
        for shard, end in enumerate(self._ends):
            before = self._ends[shard - 1] if shard else 0
            start, stop = max(self._range.start, before) - before, min(self._range.stop, end) - before
            for first in range(start, stop, _AT_ONCE):
                yield from self._readers.read(shard, list(range(first, min(first + _AT_ONCE, stop))))


class _Readers:
    """Readers of shards, opened on first use; the least recently used are closed."""

    def __init__(self, shards: Sequence[str], ends: Sequence[int]):
        self._shards, self._ends = shards, ends
        self._held: collections.OrderedDict[int, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: int, rows: list[int]) -> Sequence[bytes]:
        """Return rows of a shard by index.

        Raises:
          UserError: the shard cannot be read, or has another number of rows than its manifest says.
        """
        try:
            return self._open(shard).read(rows)
        except (RuntimeError, IndexError) as error:
            raise UserError(
                f"{self._shards[shard]}, row {rows[0] + 1}: cannot be read ({str(error)[:80]}). {_REBUILD}"
            ) from None

    def _open(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            reader = self._held.get(shard)
            if reader is None:
                reader = ArrayRecordReader(self._shards[shard], "readahead_buffer_size:0")
                self._held[shard] = reader
                found, expected = reader.num_records(), self._ends[shard] - (self._ends[shard - 1] if shard else 0)
                if found != expected:
                    raise UserError(
                        f"{self._shards[shard]}: has {found} rows, its manifest says {expected}. {_REBUILD}"
                    )
                if len(self._held) > _OPEN:
                    self._held.popitem(last=False)  # closed once no thread reads from it
            self._held.move_to_end(shard)
            return reader


_REBUILD = "Delete it and rerun shampax.launch.prepare, or the run, to rebuild it."
