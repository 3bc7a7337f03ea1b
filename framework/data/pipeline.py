"""Batches as a pure function of the step: `batches[step]`, the same on any number of processes.

The order of examples is a function of (seed, index) only, and the global batch of a step is the same set of examples
however many processes share it; so resuming needs nothing but the step.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import grain
import numpy as np

from ..errors import UserError

Example = dict[str, np.ndarray]
_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class Source(Protocol):
    """Random access to examples of fixed shapes, without a batch dimension."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Batches:
    """Endless shuffled training batches; every epoch has its own order.

    `batches[step]` is a dict of arrays [global_batch_size / process_count, ...]: this process' share of the step's
    global batch, which consists of its examples number process_index, process_index + process_count, ...

    Raises:
      UserError: the source is empty, or the batch does not divide by the processes.
    """

    def __init__(self, source: Source, *, seed: int, global_batch_size: int, process_index: int, process_count: int):
        if not len(source):
            raise UserError(f"the training split {source!r} has 0 examples; give more data or fewer tokens per example")
        local = _local_size(global_batch_size, process_count)
        shuffled = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
        self._dataset: Any = shuffled[process_index::process_count].batch(local, drop_remainder=True)

    def __getitem__(self, step: int) -> Example:
        return self._dataset[step]

    def from_step(self, step: int) -> Iterator[Example]:
        """Batches `step`, `step` + 1, ... without end, read ahead by threads."""
        iterator = iter(self._dataset.to_iter_dataset(_READ_AHEAD))
        iterator.set_state({"next_index": step})
        return iterator


class HeldoutBatches:
    """One pass over a source in order: `len(batches)` batches, `batches[i]` this process' share as in `Batches`.

    The last batch is filled with examples of zeros, which carry no weight. `limit` batches at most (-1 takes all).
    """

    def __init__(
        self, source: Source, *, global_batch_size: int, process_index: int, process_count: int, limit: int = -1
    ):
        if not len(source):
            raise UserError(f"the held-out split {source!r} has 0 examples; give more data")
        local = _local_size(global_batch_size, process_count)
        padded = grain.MapDataset.source(_Padded(source, global_batch_size))
        self._dataset: Any = padded[process_index::process_count].batch(local)
        self._length = len(self._dataset) if limit < 0 else min(limit, len(self._dataset))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        if index >= self._length:
            raise IndexError(index)
        return self._dataset[index]

    def __iter__(self) -> Iterator[Example]:
        return (self._dataset[index] for index in range(self._length))


class _Padded:
    """A source lengthened to a multiple of `multiple` by examples of zeros."""

    def __init__(self, source: Source, multiple: int):
        self._source, self._multiple = source, multiple

    def __len__(self) -> int:
        return -(-len(self._source) // self._multiple) * self._multiple

    def __getitem__(self, index: int) -> Example:
        if index < len(self._source):
            return self._source[index]
        return {name: np.zeros_like(array) for name, array in self._source[0].items()}


def _local_size(global_batch_size: int, process_count: int) -> int:
    if global_batch_size % process_count:
        lower = global_batch_size - global_batch_size % process_count
        raise UserError(
            f"batch_size {global_batch_size} is not divisible by {process_count} processes; "
            f"use {lower or process_count} or {lower + process_count}"
        )
    return global_batch_size // process_count
