"""The records of a source cut into blocks; each block becomes one shard.

The blocks depend only on the source and the block size, so shards are the same for any workers, in any order.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ...dataset import Split
from ..reading.sources import Source

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Stream:
    """A sequence of records that shards are made of.

    Attributes:
      name: prefix of the names of its shards.
      split: split of its rows; None if they belong to both.
      blocks: returns an iterator over blocks; unread records of a block are skipped.
      fraction: returns the fraction (0 to 1) that the latest such iterator has consumed.
      weight: expected work, relative to the source's other streams.
      one_worker: whether one worker makes all its shards, because skipping records costs as much as making rows.
    """

    name: str
    split: Split | None
    blocks: Callable[[], Iterator[Iterator[Any]]]
    fraction: Callable[[], float]
    weight: float = 1.0
    one_worker: bool = False


def of_split(source: Source[Any], split: Split, size: int, limit: int) -> Stream:
    """Return the records of a split in blocks of `size`, at most `limit` records (0 takes all)."""
    count = source.count(split)
    if count is None:
        return Stream(
            split,
            split,
            lambda: blocks_of(itertools.islice(source.stream(split), limit or None), size),
            source.fraction,
            weight=9.0 if split == "train" else 1.0,  # every tenth record is held out
        )
    end, reached = min(count, limit or count), 0

    def blocks() -> Iterator[Iterator[Any]]:
        nonlocal reached
        for start in range(0, end, size):
            yield source.stream(split, start, min(start + size, end))
            reached = start + size

    return Stream(split, split, blocks, lambda: min(reached / max(end, 1), 1.0), weight=max(end, 1))


def blocks_of(records: Iterator[T], size: int) -> Iterator[Iterator[T]]:
    """Yield blocks of `size` records; asking for the next block skips the unread records of the last."""
    for first in records:
        block = itertools.chain([first], itertools.islice(records, size - 1))
        yield block
        collections.deque(block, maxlen=0)
