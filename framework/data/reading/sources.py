"""Sources: streams of records, cut into blocks, each of which becomes one shard.

The blocks depend only on the source and the block size, so shards are the same for any workers, in any order.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from etils import epath

from ...base.errors import UserError
from ...dataset import SPLITS, Split
from . import files
from .malformed import Malformed
from .tfds import TfdsSet

T = TypeVar("T")
Blocks = Iterator[Iterator[Any]]
_LEAST, _FEW = 10, 100  # records of files: the least allowed, and a number from which on any sample is large enough
_LARGEST_PART = 1 << 20  # bytes


@dataclasses.dataclass
class Cursor:
    """Where in a stream its reader is.

    Attributes:
      block: number of the block that is read first.
      place: numbers of a file and of the record in it after which to read on; None from the beginning.
    """

    block: int = 0
    place: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True)
class Stream:
    """A sequence of records, malformed ones included.

    Attributes:
      name: prefix of the names of its shards.
      split: split of its records; None if they belong to both.
      blocks: returns an iterator over the blocks from a cursor on, by default all; unread records of a block are
        skipped. Where records come from files, the cursor's place follows.
      shards: number of its blocks, if it is known before they are read.
      one_worker: whether one worker makes all its shards, because skipping records costs as much as making rows.
    """

    name: str
    split: Split | None
    blocks: Callable[..., Blocks]
    shards: int | None = None
    one_worker: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
    """All records of a data set.

    Attributes:
      fingerprint: changes when they may have changed.
      streams: the records.
      text_bytes: about how many bytes of text they have; 0 if they are few.
    """

    fingerprint: str
    streams: Sequence[Stream]
    text_bytes: int = 0

    def records(self, split: Split) -> Iterator[Any]:
        """Yield the records of a split in order, malformed ones included."""
        blocks = (stream.blocks() for stream in self.streams if stream.split == split)
        return itertools.chain.from_iterable(itertools.chain.from_iterable(blocks))


def of_splits(fingerprint: str, records: Callable[[Split], Iterator[Any]], size: int, limit: int = 0) -> Source:
    """Return the source of records that are read in order.

    Held-out records come first, as in all sources, so that errors in them show within seconds.

    Args:
      fingerprint: see `Source`.
      records: yields the records of a split.
      size: records of a block.
      limit: maximum number of records of a split; 0 for all.
    """
    return _following(fingerprint, lambda split, cursor: records(split), size, limit)


def _following(fingerprint: str, records: Callable[[Split, Cursor], Iterator[Any]], size: int, limit: int) -> Source:
    """Return the source of records that are read in order, from a cursor on; see `of_splits`."""

    def blocks(split: Split, cursor: Cursor | None = None) -> Blocks:
        cursor = cursor or Cursor()
        left = max(0, limit - cursor.block * size) if limit else None
        return blocks_of(itertools.islice(records(split, cursor), left), size)

    return Source(fingerprint, [Stream(split, split, functools.partial(blocks, split)) for split in reversed(SPLITS)])


def _in_order(found: Sequence[epath.Path], read: Callable[[epath.Path], Iterator[T]], cursor: Cursor) -> Iterator[T]:
    """Yield the records of files from a cursor on, which follows. Files before its place are not opened."""
    first, known = cursor.place or (0, 0)
    for number in range(first, len(found)):
        for count, record in enumerate(read(found[number]), start=1):
            if number > first or count > known:
                cursor.place = [number, count]
                yield record


def file_source(
    found: list[epath.Path],
    read: Callable[[epath.Path], Iterator[T | Malformed]],
    cut: Callable[[epath.Path, int], Iterator[T | Malformed]],
    text: Callable[[T], str],
    heldout_fraction: float,
    size: int,
    limit: int,
) -> Source:
    """Return the records of files, in the order of their paths.

    A record is held out if a hash of its text is small: other records hardly change its split, and equal texts share
    one. Malformed records count as training records.

    Args:
      found: the files.
      read: yields the records of a file.
      cut: yields the records of a file cut into parts of about a number of bytes; used if there are fewer than 10.
      text: returns the text of a record.
      heldout_fraction: fraction of the records to hold out.
      size: see `of_splits`.
      limit: see `of_splits`.

    Raises:
      UserError: a file cannot be read, or there are too few records.
    """

    def every(cursor: Cursor) -> Iterator[T | Malformed]:
        return _in_order(found, lambda path: cut(path, part) if part else read(path), cursor)

    part = 0
    if len(list(itertools.islice(every(Cursor()), _LEAST))) < _LEAST:
        part = min(max(sum(path.stat().length for path in found) // _FEW, _FEW), _LARGEST_PART)

    def hashed(record: T) -> int:
        return int.from_bytes(hashlib.blake2b(text(record).encode(), digest_size=8).digest())

    def records(split: Split, cursor: Cursor) -> Iterator[T | Malformed]:
        for record in every(cursor):
            held_out = not isinstance(record, Malformed) and hashed(record) < bound
            if held_out == (split == "heldout"):
                yield record

    first = list(itertools.islice(every(Cursor()), _FEW))
    hashes = sorted({hashed(record) for record in first if not isinstance(record, Malformed)})
    if len(first) == _FEW:
        bound = heldout_fraction * 2**64
    elif len(hashes) >= _LEAST:
        bound = hashes[min(max(round(heldout_fraction * len(hashes)), 1), len(hashes) - 1)]
    else:
        raise UserError(
            f"data.source: the files that match, such as {found[0]}, have {len(hashes)} different records, and two "
            f"splits need at least {_LEAST}. Give more."
        )
    fingerprint = hashlib.sha256(repr(files.stats(found)).encode()).hexdigest()
    return dataclasses.replace(_following(fingerprint, records, size, limit), text_bytes=files.text_bytes(found))


def split_source(
    found: Mapping[Split, list[epath.Path]], read: Callable[[epath.Path], Iterator[Any]], size: int, limit: int
) -> Source:
    """Return the records of the files of each split, in order; see `file_source` and `of_splits`."""

    def records(split: Split, cursor: Cursor) -> Iterator[Any]:
        return _in_order(found[split], read, cursor)

    stats = {split: files.stats(paths) for split, paths in found.items()}
    source = _following(hashlib.sha256(repr(stats).encode()).hexdigest(), records, size, limit)
    return dataclasses.replace(source, text_bytes=sum(map(files.text_bytes, found.values())))


def tfds_source(tfds: TfdsSet, make: Callable[..., Any], size: int, limit: int, mixed: bool = False) -> Source:
    """Return the records of a tfds set, of which a worker reads only its own blocks.

    Args:
      tfds: the set.
      make: returns the record of the features' texts, in their order; texts of white space only are skipped.
      size: see `of_splits`.
      limit: see `of_splits`.
      mixed: whether blocks come in a random order, always the same.
    """

    def records(split: Split, start: int, stop: int) -> Iterator[Any]:
        for place, example in tfds.stream(split, start, stop):
            if isinstance(example, Malformed):
                yield example
                continue
            try:
                record = make(*(example[feature].decode("utf-8") for feature in tfds.features))
            except UnicodeDecodeError as error:
                record = Malformed(place, f"not UTF-8 at byte {error.start}")
            if not isinstance(record, str) or (record and not record.isspace()):
                yield record

    def stream(split: Split) -> Stream:
        count = len(tfds.source(split))
        end = min(count, limit or count)
        starts: Sequence[int] = range(0, end, size)
        if mixed:
            starts = np.random.default_rng(0).permutation(starts).tolist()

        def blocks(cursor: Cursor | None = None) -> Blocks:
            return (records(split, start, min(start + size, end)) for start in starts)

        return Stream(split, split, blocks, len(starts))

    return Source(tfds.fingerprint, [stream(split) for split in reversed(SPLITS)], tfds.text_bytes)


def blocks_of(records: Iterator[T], size: int) -> Iterator[Iterator[T]]:
    """Yield blocks of `size` records; asking for the next block skips the unread records of the last."""
    for first in records:
        block = itertools.chain([first], itertools.islice(records, size - 1))
        yield block
        collections.deque(block, maxlen=0)
