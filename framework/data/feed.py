"""The data of a run: training and held-out batches, on the devices."""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from .. import dataset
from ..distributed import agreement
from ..sharding.global_batch import Share
from .pipeline import Batches, HeldoutBatches, Reading


class Feed:
    """Batches of a data set, laid over a mesh; opening one prepares the data in the folder `cache` on process 0.

    Attributes:
      examples: number of training examples.
      fingerprint: of the training data, "" if the data set has none.
      heldout_examples: number of held-out examples that one evaluation reads.
      decode: decodes the token ids of an example to text; None for data that are not text.
      reading: how batches are read.
      batch_spec: shapes and shardings of a global batch.

    Raises:
      UserError: the data cannot be used.
    """

    def __init__(self, data: dataset.Data, cache: Path, mesh: Mesh, config: Any):
        agreement.first(lambda: data.prepare(cache))
        source, heldout_source = data.examples("train", cache), data.examples("heldout", cache)
        self._share, evaluation = Share(config.batch_size, mesh), config.evaluation
        self.reading = Reading.choose(source, **config.input)
        rows = {"global_batch_size": config.batch_size, "rows": self._share.rows, "reading": self.reading}
        self._train = Batches(source, seed=config.seed, augment=dataset.augment(data), **rows)
        self._heldout = HeldoutBatches(heldout_source, limit=evaluation.batches, sample=evaluation.sample, **rows)
        self.examples = len(source)
        self.fingerprint = dataset.fingerprint(data, cache)
        self.heldout_examples = min(len(heldout_source), len(self._heldout) * config.batch_size)
        self.decode = dataset.decoder(data, cache)
        self.batch_spec = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding),
            self._share.to_devices(self._train[0]),
        )

    def train(self, number: int) -> Generator[Any]:
        """Yield training batches `number`, `number` + 1, ... without end. Close the iterator to end its workers."""
        with contextlib.closing(self._train.from_step(number)) as batches:
            yield from map(self._share.to_devices, batches)

    def heldout(self) -> Generator[Any]:
        """Yield the held-out batches once."""
        with contextlib.closing(iter(self._heldout)) as batches:
            yield from map(self._share.to_devices, batches)
