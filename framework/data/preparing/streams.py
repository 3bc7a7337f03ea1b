"""The records of a source cut into blocks, of each of which a shard is made.

Which records are in a block is a function of the source and of the block's size alone, so that shards are the same
whoever makes them, in whatever order.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from ...dataset import Split

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Stream:
    """A sequence of records that shards are made of.

    Attributes:
      name: what the names of its shards begin with.
      split: which its rows belong to; None for both.
      blocks: gives the blocks in order; what of a block is not read is passed over.
      passed: which share of the stream the newest iteration over `blocks` has behind it.
      weight: how long it takes, next to the source's other streams.
      together: whether one worker makes all of its shards, since passing over records costs as much as making rows.
    """

    name: str
    split: Split | None
    blocks: Callable[[], Iterator[Iterator[Any]]]
    passed: Callable[[], float]
    weight: float = 1.0
    together: bool = False


class Source(Protocol):
    """What has the records of two splits: documents, or pairs."""

    def stream(self, split: Split, start: int = 0, stop: int | None = None) -> Iterator[Any]:
        """Records number `start` to `stop` of a split, in a fixed order, malformed ones among them."""
        ...

    def count(self, split: Split) -> int | None:
        """How many records a split has; None where only reading them all tells, and `stream` begins with the first."""
        ...

    def passed(self) -> float:
        """Which share of its files the newest stream has read; of use where `count` is None."""
        ...


def of_split(source: Source, split: Split, size: int, limit: int) -> Stream:
    """The records of a split in blocks of `size`; the first `limit` of them, 0 takes all."""
    count = source.count(split)
    if count is None:
        return Stream(
            split,
            split,
            lambda: cut(itertools.islice(source.stream(split), limit or None), size),
            source.passed,
            weight=9.0 if split == "train" else 1.0,  # nine in ten are trained on
        )
    end, reached = min(count, limit or count), [0]

    def blocks() -> Iterator[Iterator[Any]]:
        for start in range(0, end, size):
            yield source.stream(split, start, min(start + size, end))
            reached[0] = start + size

    return Stream(split, split, blocks, lambda: min(reached[0] / max(end, 1), 1.0), weight=max(end, 1))


def cut(records: Iterator[T], size: int) -> Iterator[Iterator[T]]:
    """Blocks of `size` records; whatever of a block has not been read is read past when the next is asked for."""
    for first in records:
        block = itertools.chain([first], itertools.islice(records, size - 1))
        yield block
        collections.deque(block, maxlen=0)
