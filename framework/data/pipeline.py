"""Batches as a pure function of their index: `batches[i]`, of which a process reads the rows that its devices hold.

Row r of batch i is example i * global_batch_size + r of one order, a function of the seed alone. Resuming needs only
the index, on any mesh and any number of processes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from ..base.errors import UserError
from ..dataset import Augment, Example, Source

_SAMPLE_SEED = 20_260_101  # of the held-out sample; independent of the run's seed
_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class Batches:
    """Endless shuffled training batches; every epoch has its own order, and a batch may span two epochs.

    `batches[i]`, for any i >= 0, is a dict of arrays [len(rows), ...]: the given rows of batch i, in the given order.
    Other rows of the batch are not read.

    Args:
      source: the examples.
      seed: determines their order.
      global_batch_size: rows of the global batch.
      rows: indices of the rows to read, such as `global_batch.Share.rows`.
      augment: applied to each example, with a generator that depends only on the seed and the example's batch and row.

    Raises:
      UserError: the source is empty.
    """

    def __init__(
        self, source: Source, *, seed: int, global_batch_size: int, rows: Sequence[int], augment: Augment | None = None
    ):
        if not len(source):
            raise UserError(f"the training split {source!r} has 0 examples. Give more data or shorter examples.")
        shuffled = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
        if augment is not None:
            shuffled = shuffled.random_map(augment)
        self._dataset = _batches_of_rows(shuffled, global_batch_size, rows)

    def __getitem__(self, number: int) -> Example:
        if number < 0:
            raise IndexError(number)
        return self._dataset[number]

    def from_step(self, number: int) -> Iterator[Example]:
        """Yield batches `number`, `number` + 1, ... without end; threads read ahead."""
        iterator = iter(self._dataset.to_iter_dataset(_READ_AHEAD))
        iterator.set_state({"next_index": number})
        return iterator


class HeldoutBatches:
    """One pass over a source, at most `limit` batches (-1 takes all); `batches[i]` is as in `Batches`.

    With `sample`, limited batches are a random sample of the source, always the same; else its first examples. The last
    batch is padded with examples of zeros, which have no weight.
    """

    def __init__(
        self, source: Source, *, global_batch_size: int, rows: Sequence[int], limit: int = -1, sample: bool = False
    ):
        if not len(source):
            raise UserError(f"the held-out split {source!r} has 0 examples. Give more data.")
        examples: Any = source
        if sample and 0 <= limit * global_batch_size < len(source):
            examples = grain.MapDataset.source(source).shuffle(seed=_SAMPLE_SEED)
        self._dataset = _batches_of_rows(_Padded(examples, global_batch_size), global_batch_size, rows)
        self._length = len(self._dataset) if limit < 0 else min(limit, len(self._dataset))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._length:
            raise IndexError(index)
        return self._dataset[index]

    def __iter__(self) -> Iterator[Example]:
        return (self._dataset[index] for index in range(self._length))


def _batches_of_rows(examples: Any, batch_size: int, rows: Sequence[int]) -> Any:
    """Return a grain data set of batches [len(rows), ...]; the number of examples is a multiple of `batch_size`."""
    return grain.MapDataset.source(_Rows(examples, batch_size, rows)).batch(len(rows), drop_remainder=True)


class _Rows:
    """The given rows of every `batch_size` examples, batch after batch."""

    def __init__(self, examples: Any, batch_size: int, rows: Sequence[int]):
        assert len(rows) and min(rows) >= 0 and max(rows) < batch_size, (rows, batch_size)
        self._examples, self._batch_size, self._rows = examples, batch_size, [int(row) for row in rows]

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Example:
        batch, place = divmod(index, len(self._rows))
        return self._examples[batch * self._batch_size + self._rows[place]]


class _Padded:
    """A source padded with examples of zeros to a multiple of `multiple`."""

    def __init__(self, source: Source, multiple: int):
        self._source, self._multiple = source, multiple

    def __len__(self) -> int:
        return -(-len(self._source) // self._multiple) * self._multiple

    def __getitem__(self, index: int) -> Example:
        if index < len(self._source):
            return self._source[index]
        return {name: np.zeros_like(array) for name, array in self._source[0].items()}
