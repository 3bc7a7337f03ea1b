"""Several sources of training examples, mixed by weights: the order of the examples is a function of seed and position.

Of each n examples in a row, a source gives its share of n, up to one for each source before it. Each source is read in
an order of its own, epoch after epoch; a new stage changes the weights and continues these orders.
"""

import bisect
import itertools
import operator
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epy

from ..dataset import Example, Source
from .preparing.windows import ENDLESS

with epy.lazy_imports():
    import grain

_SHIFT = 32  # shares are integers per 2**32


def in_order(count: int, seed: int) -> Any:
    """Return an endless MapDataset of the indices below `count`; every epoch has its own order."""
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat(None)


def order_of(source: Source, seed: int) -> Any:
    """Return the endless MapDataset of the indices of a source to train on: its own order, if it has one."""
    own = getattr(source, "order", None)
    return own(seed) if own else in_order(len(source), seed)


def made(source: Source, position: int) -> int:
    """Return how many examples of the order of a source exist, as far as example `position` needs it."""
    own = getattr(source, "made", None)
    return own(position) if own else ENDLESS


class Mixed:
    """The examples of several sources, one after the other, and the order in which to train on them.

    Args:
      sources: by name.
      stages: first example of each stage, from 0 on, and the weights of the sources.
    """

    def __init__(self, sources: Mapping[str, Source], stages: Sequence[tuple[int, Sequence[float]]]):
        self._names, self._sources = list(sources), list(sources.values())
        self._starts = [0, *itertools.accumulate(map(len, self._sources))]
        self._stages = list(stages)
        self.in_workers = all(getattr(source, "in_workers", False) for source in self._sources)

    def __repr__(self) -> str:
        return f"Mixed({dict(zip(self._names, self._sources, strict=True))})"

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Return examples; neighbours of one source are read by one call."""
        examples: list[Example] = []
        for number, own in itertools.groupby(indices, lambda index: bisect.bisect_right(self._starts, index) - 1):
            source, places = self._sources[number], [index - self._starts[number] for index in own]
            several = getattr(source, "__getitems__", None)
            examples.extend(several(places) if several else map(source.__getitem__, places))
        return examples

    def order(self, seed: int) -> Any:
        """Return the endless MapDataset of the indices to train on."""
        seeds = (zlib.crc32(name.encode()) ^ seed for name in self._names)
        orders = [order_of(source, own) for source, own in zip(self._sources, seeds, strict=True)]
        return grain.MapDataset.range(2**63 - 1).map(_Order(orders, self._starts, self._stages)).seed(seed)

    def made(self, position: int) -> int:
        """Return how many examples of the order can be read without waiting; see `Windows.made`."""
        used = totals(self._stages, position + 1)
        found = [made(source, max(0, own - 1)) for source, own in zip(self._sources, used, strict=True)]
        return bisect.bisect_left(
            range(ENDLESS), True, key=lambda n: any(map(operator.gt, totals(self._stages, n + 1), found))
        )

    def stop(self) -> None:
        """End the waiting of all threads for rows."""
        for source in self._sources:
            getattr(source, "stop", bool)()


class _Order:
    """Maps the position of an example in training to its index; pickled for workers."""

    def __init__(self, orders: Sequence[Any], starts: Sequence[int], stages: Sequence[tuple[int, Sequence[float]]]):
        self._orders, self._starts = orders, starts
        self._begins = [begin for begin, _ in stages]
        self._shares = [shares_of(weights) for _, weights in stages]
        self._used = [totals(stages, begin) for begin in self._begins]  # examples of each source before each stage

    def __call__(self, position: int) -> int:
        stage = bisect.bisect_right(self._begins, position) - 1
        number, place = pick(position - self._begins[stage], self._shares[stage])
        return self._starts[number] + self._orders[number][self._used[stage][number] + place]


def shares_of(weights: Sequence[float]) -> list[int]:
    """Return of each source its share, per 2**32, of what the sources before it leave."""
    rest = itertools.accumulate(reversed(weights))
    return [round(2**_SHIFT * weight / (total or 1)) for weight, total in zip(weights, [*rest][::-1], strict=True)]


def pick(number: int, shares: Sequence[int]) -> tuple[int, int]:
    """Return the source of example `number` of a stage, and how many examples before it are of this source."""
    for source, share in enumerate(shares):
        before = number * share >> _SHIFT
        if (number + 1) * share >> _SHIFT > before:
            return source, before
        number -= before
    raise AssertionError(shares)


def totals(stages: Sequence[tuple[int, Sequence[float]]], examples: int) -> list[int]:
    """Return how many of the first `examples` examples of a run are of each source; stages as of `Mixed`."""
    used = [0] * len(stages[0][1])
    begins = [min(begin, examples) for begin, _ in stages]
    for (_, weights), begin, end in zip(stages, begins, [*begins[1:], examples], strict=True):
        used = [a + b for a, b in zip(used, counts(end - begin, shares_of(weights)), strict=True)]
    return used


def counts(number: int, shares: Sequence[int]) -> Iterator[int]:
    """Yield how many of the first `number` examples of a stage are of each source."""
    for share in shares:
        own = number * share >> _SHIFT
        yield own
        number -= own
