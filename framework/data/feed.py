"""The data of a run: training and held-out batches, on the devices."""

import contextlib
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from .. import dataset
from ..base.errors import UserError
from ..config import overrides
from ..distributed import agreement
from ..sharding.global_batch import Share
from .pipeline import Batches, HeldoutBatches, Reading


class Heldout:
    """The held-out batches of a data set, laid over a mesh; iterate for one pass.

    Attributes:
      examples: number of examples of one pass.
      decode: decodes the token ids of an example to text; None for data that are not text.
    """

    def __init__(self, data: dataset.Data, cache: Path, share: Share, options: Any, **rows: Any):
        source = data.examples("heldout", cache)
        self._share = share
        self._batches = HeldoutBatches(source, limit=options.batches, sample=options.sample, **rows)
        self.examples = min(len(source), len(self._batches) * rows["global_batch_size"])
        self.decode = dataset.decoder(data, cache)

    def __iter__(self) -> Generator[Any]:
        with contextlib.closing(iter(self._batches)) as batches:
            yield from map(self._share.to_devices, batches)

    def shapes(self) -> dict[str, str]:
        """Return type and shape of the arrays of an example."""
        return {name: f"{array.dtype}{list(array.shape[1:])}" for name, array in sorted(self._batches[0].items())}


class Feed:
    """Batches of a data set, laid over a mesh; opening one prepares the data in the folder `cache` on process 0.

    Args:
      data: the data set.
      sets: further held-out sets, by name.
      cache: folder of prepared data.
      mesh: the mesh.
      config: the config.

    Attributes:
      examples: number of training examples.
      fingerprint: of the training data, "" if the data set has none.
      heldout: the held-out batches of the data set, by the name "", and of the further sets.
      reading: how batches are read.
      batch_spec: shapes and shardings of a global batch.

    Raises:
      UserError: the data cannot be used.
    """

    def __init__(self, data: dataset.Data, sets: Mapping[str, dataset.Data], cache: Path, mesh: Mesh, config: Any):
        agreement.first(lambda: data.prepare(cache))
        source = data.examples("train", cache)
        self._share = Share(config.batch_size, mesh)
        self.reading = Reading.choose(source, **config.input)
        rows = {"global_batch_size": config.batch_size, "rows": self._share.rows, "reading": self.reading}
        self._train = Batches(source, seed=config.seed, augment=dataset.augment(data), **rows)
        self.examples = len(source)
        self.fingerprint = dataset.fingerprint(data, cache)
        self.heldout = {"": Heldout(data, cache, self._share, config.evaluation, **rows)}
        for name, each in sets.items():
            self.heldout[name] = self._further(name, dataset.beside(each, data, cache), cache, config, rows)
        self.batch_spec = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding),
            self._share.to_devices(self._train[0]),
        )

    def train(self, number: int) -> Generator[Any]:
        """Yield training batches `number`, `number` + 1, ... without end. Close the iterator to end its workers."""
        with contextlib.closing(self._train.from_step(number)) as batches:
            yield from map(self._share.to_devices, batches)

    def _further(self, name: str, data: dataset.Data, cache: Path, config: Any, rows: dict[str, Any]) -> Heldout:
        with overrides.about(f"evaluation.sets: {name}"):
            agreement.first(lambda: data.prepare(cache))
            found = Heldout(data, cache, self._share, config.evaluation, **rows)
        given, wanted = found.shapes(), self.heldout[""].shapes()
        if given != wanted:
            raise UserError(
                f"config.evaluation.sets: {name}: an example has {given}, but one of config.data has {wanted}. Use the "
                "same shapes."
            )
        return found
