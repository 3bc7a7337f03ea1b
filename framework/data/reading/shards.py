"""Rows as bytes in ArrayRecord files: a shard is written once in order, rows of many shards are read at random.

Groups of up to 64 uncompressed rows: reading one costs 10 to 50 microseconds of a core, where groups of one, which
grain asks for, cost 200 and more. A row of a damaged file is refused, since ArrayRecord keeps a checksum of each group.
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

_GROUP_BYTES, _LEAST, _MOST = 10_240, 8, 64  # rows of a group: as many as make so many bytes, within these bounds
_OPEN = 512  # readers held open; each takes a file descriptor, of which a process often has 1,024
_AT_ONCE = 4_096  # rows read in one go


class Written(NamedTuple):
    """What `write` has done: the number of rows, a hash of them, and the size of the file."""

    rows: int
    content: str
    bytes: int


def write(path: epath.Path, rows: Iterable[bytes]) -> Written:
    """Stream rows to a file, which appears when it is whole; one of a bucket is written here and then copied there."""
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
    """Random access to the rows `start` to `stop` of shards taken one after the other; a pickled copy has no readers.

    ArrayRecord opens gs:// by itself.

    Args:
      shards: files of `write`.
      counts: how many rows each of them has.
      decode: the example that a row stands for.
      start, stop: as of a slice; all by default.
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
        """All rows in order as they were written, read many at a time."""
        for shard, end in enumerate(self._ends):
            before = self._ends[shard - 1] if shard else 0
            start, stop = max(self._range.start, before) - before, min(self._range.stop, end) - before
            for first in range(start, stop, _AT_ONCE):
                yield from self._readers.read(shard, list(range(first, min(first + _AT_ONCE, stop))))


class _Readers:
    """Readers of shards, opened when first needed; those longest unused are closed."""

    def __init__(self, shards: Sequence[str], ends: Sequence[int]):
        self._shards, self._ends = shards, ends
        self._held: collections.OrderedDict[int, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: int, rows: list[int]) -> Sequence[bytes]:
        """Rows of a shard by number.

        Raises:
          UserError: it cannot be read, or is not as long as it is said to be.
        """
        try:
            return self._open(shard).read(rows)
        except (RuntimeError, IndexError) as error:
            raise UserError(
                f"{self._shards[shard]}, row {rows[0] + 1} cannot be read ({str(error)[:80]}); {_AGAIN}"
            ) from None

    def _open(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            reader = self._held.get(shard)
            if reader is None:
                reader = ArrayRecordReader(self._shards[shard], "readahead_buffer_size:0")
                self._held[shard] = reader
                found, expected = reader.num_records(), self._ends[shard] - (self._ends[shard - 1] if shard else 0)
                if found != expected:
                    raise UserError(f"{self._shards[shard]} has {found} rows, its manifest says {expected}; {_AGAIN}")
                if len(self._held) > _OPEN:
                    self._held.popitem(last=False)  # closed once no thread reads from it
            self._held.move_to_end(shard)
            return reader


_AGAIN = "remove it, and preparing again makes it anew"
