"""Batches as a pure function of their index: `batches[i]`, of which a process reads the rows that its devices hold.

Row r of batch i is example i * global_batch_size + r of one order, a function of the seed, and of the weights of a
mixture, alone. Resuming needs only the index, on any mesh, any number of processes, and any number of threads and
workers that read.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import flags
from etils import epy

from ..base.errors import UserError
from ..dataset import Augment, Example, Source
from .mixing import order_of
from .preparing.workers import exit_with_parent

with epy.lazy_imports():  # takes 0.2 s, while the steps are compiled
    import grain

_SAMPLE_SEED = 20_260_101  # of the held-out sample; independent of the run's seed
_PIECE = 8  # rows that one thread reads at least
_MOST_THREADS = 64  # as grain and array_record use for remote files
_CORES_PER_WORKER, _LARGE = 16, 100_000  # a worker takes seconds to start and 0.3 GB; small data need none


@dataclasses.dataclass(frozen=True)
class Reading:
    """How batches are read, which does not change them.

    Attributes:
      threads: threads that read examples, in this process or in each worker.
      workers: processes that read training batches; 0 reads them in this process.
      ahead: batches to read ahead.
    """

    threads: int = 2
    workers: int = 0
    ahead: int = 8

    @classmethod
    def choose(cls, source: Source, *, threads: int, workers: int, ahead: int) -> "Reading":
        """Replace defaults, 0 threads and -1 workers, by values for this host and the training examples."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if workers < 0:
            # A worker imports the main program, which only `python -m` makes safe for programs of any form.
            startable = getattr(sys.modules["__main__"], "__spec__", None) is not None
            helpful = startable and getattr(source, "in_workers", False) and len(source) >= _LARGE
            workers = cores // _CORES_PER_WORKER if helpful else 0
        return cls(threads or min(4 * cores, _MOST_THREADS), workers, ahead)

    def __str__(self) -> str:
        return f"threads {self.threads}, workers {self.workers}, batches ahead {self.ahead}"


class Batches:
    """Endless shuffled training batches; every epoch has its own order, and a batch may span two epochs.

    `batches[i]`, for any i >= 0, is a dict of arrays [len(rows), ...]: the given rows of batch i, in the given order.
    Other rows of the batch are not read.

    Args:
      source: the examples, or a mixture of several sources.
      seed: determines their order.
      global_batch_size: rows of the global batch.
      rows: indices of the rows to read, such as `global_batch.Share.rows`.
      augment: applied to each example, with a generator that depends only on the seed and the example's batch and row.
      reading: how to read.

    Raises:
      UserError: the source is empty.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        global_batch_size: int,
        rows: Sequence[int],
        augment: Augment | None = None,
        reading: Reading = Reading(),
    ):
        if not len(source):
            raise UserError(f"the training split {source!r} has 0 examples. Give more data or shorter examples.")
        order = order_of(source, seed)
        if augment is not None:
            order = order.random_map(_with_random_state)
        self._batches, self._reading = _Batches(source, order, global_batch_size, rows, reading, augment), reading

    def __getitem__(self, number: int) -> Example:
        if number < 0:
            raise IndexError(number)
        return self._batches[number]

    def from_step(self, number: int) -> Generator[Example]:
        """Yield batches `number`, `number` + 1, ... without end, read ahead. Close the iterator to end the workers."""
        return _read_ahead(self._batches, number, self._reading)


class HeldoutBatches:
    """One pass over a source, at most `limit` batches (-1 takes all); `batches[i]` is as in `Batches`.

    With `sample`, limited batches are a random sample of the source, always the same; else its first examples. The last
    batch is padded with examples of zeros, which have no weight. Threads of this process read ahead.
    """

    def __init__(
        self,
        source: Source,
        *,
        global_batch_size: int,
        rows: Sequence[int],
        limit: int = -1,
        sample: bool = False,
        reading: Reading = Reading(),
    ):
        if not len(source):
            raise UserError(f"the held-out split {source!r} has 0 examples. Give more data.")
        order: Any = range(-(-len(source) // global_batch_size) * global_batch_size)
        if sample and 0 <= limit * global_batch_size < len(source):
            order = grain.MapDataset.range(len(source)).shuffle(seed=_SAMPLE_SEED)[: limit * global_batch_size]
        elif limit >= 0:
            order = order[: limit * global_batch_size]
        self._batches = _Batches(source, order, global_batch_size, rows, reading)
        self._reading = dataclasses.replace(reading, workers=0)  # they start in seconds, and a pass is short

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._batches[index]

    def __iter__(self) -> Generator[Example]:
        return _read_ahead(self._batches, 0, self._reading)


class _Batches:
    """Some rows of every `batch_size` examples of an order; pickled for workers.

    Args:
      source: the examples; several are read by one call of its `__getitems__`, if it has one.
      order: indices of examples, with the state of a random generator if there is an `augment`. An index past the end
        of the source stands for an example of zeros.
    """

    def __init__(
        self,
        source: Source,
        order: Any,
        batch_size: int,
        rows: Sequence[int],
        reading: Reading,
        augment: Augment | None = None,
    ):
        assert len(rows) and min(rows) >= 0 and max(rows) < batch_size, (rows, batch_size)
        self._source, self._order, self._augment = source, order, augment
        self._batch_size, self._rows, self._threads = batch_size, [int(row) for row in rows], reading.threads

    def __len__(self) -> int:
        return len(self._order) // self._batch_size

    def __getitem__(self, index: int) -> Example:
        wanted: list[tuple[int, int, Any]] = []  # (index of an example, row, random state)
        for row, place in enumerate(self._rows):
            found = self._order[index * self._batch_size + place]
            example, state = found if self._augment else (found, None)
            if example < len(self._source):
                wanted.append((example, row, state))
        wanted.sort(key=lambda each: each[0])  # neighbours are in one shard, which one call reads
        size = max(_PIECE, -(-len(wanted) // self._threads))
        pieces = [wanted[first : first + size] for first in range(0, len(wanted), size)]
        read = _pool(self._threads).map if len(pieces) > 1 else map
        stacked = None if self._augment else getattr(self._source, "stacked", None)
        if stacked and wanted:
            arrays = list(read(lambda piece: stacked([index for index, _, _ in piece]), pieces))
            places = [row for _, row, _ in wanted]
            batch = {name: np.zeros((len(self._rows), *x.shape[1:]), x.dtype) for name, x in arrays[0].items()}
            for name, array in batch.items():
                array[places] = np.concatenate([each[name] for each in arrays])
            return batch
        examples = dict(itertools.chain.from_iterable(read(self._read, pieces)))
        if len(examples) < len(self._rows):
            like = next(iter(examples.values()), None) or self._source[0]
            zeros = {name: np.zeros_like(array) for name, array in like.items()}
            examples = dict.fromkeys(range(len(self._rows)), zeros) | examples
        return {name: np.stack([examples[row][name] for row in range(len(self._rows))]) for name in examples[0]}

    def stop(self) -> None:
        """End the waiting of threads for rows that are still being made."""
        getattr(self._source, "stop", bool)()

    def _read(self, piece: Sequence[tuple[int, int, Any]]) -> list[tuple[int, Example]]:
        """Return the examples of a piece by row."""
        indices = [index for index, _, _ in piece]
        several = getattr(self._source, "__getitems__", None)
        examples = several(indices) if several else map(self._source.__getitem__, indices)
        return [
            (row, self._augment(example, _generator(state)) if self._augment else example)
            for (_, row, state), example in zip(piece, examples, strict=True)
        ]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="reading")


def _read_ahead(batches: _Batches, start: int, reading: Reading) -> Generator[Example]:
    """Yield the batches from `start` on, in order."""
    ahead = -(-reading.ahead // max(1, reading.workers))  # of each worker
    options = grain.ReadOptions(num_threads=min(reading.threads, ahead), prefetch_buffer_size=ahead)
    data = grain.MapDataset.source(batches)[start:].to_iter_dataset(options)
    if reading.workers:
        flags.FLAGS.mark_as_parsed()  # grain looks at its flags, which only absl's command lines parse
        workers = grain.MultiprocessingOptions(num_workers=reading.workers)
        data = data.mp_prefetch(workers, worker_init_fn=_begin_worker)
    with contextlib.closing(iter(data)) as iterator:
        try:
            for batch in iterator:
                # Arrays of workers are in shared memory, which is freed with the last of these views.
                yield {name: array.view(np.ndarray) for name, array in batch.items()}
        finally:
            batches.stop()


def _begin_worker(number: int, workers: int) -> None:
    """Leave signals to the main process, which ends its workers; end if it is killed."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def _with_random_state(index: int, rng: np.random.Generator) -> tuple[int, Any]:
    return index, rng.bit_generator.state  # grain uses the generator again


def _generator(state: Any) -> np.random.Generator:
    bits = np.random.Philox(key=0)
    bits.state = state
    return np.random.Generator(bits)
