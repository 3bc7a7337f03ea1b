"""The data of a run: training and held-out batches, on the devices."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from .. import dataset
from ..distributed import agreement
from ..sharding.global_batch import Share
from .pipeline import Batches, HeldoutBatches


@dataclasses.dataclass(frozen=True)
class Feed:
    """Batches of a data set, laid over a mesh.

    Attributes:
      examples: number of training examples.
      fingerprint: of the training data, "" if the data set has none.
      heldout_examples: number of held-out examples that one evaluation reads.
      decode: decodes the token ids of an example to text; None for data that are not text.
      batch_spec: shapes and shardings of a global batch.
    """

    examples: int
    fingerprint: str
    heldout_examples: int
    decode: dataset.Decoder | None
    batch_spec: dict[str, jax.ShapeDtypeStruct]
    _train: Batches
    _heldout: HeldoutBatches
    _share: Share

    @classmethod
    def open(cls, data: dataset.Data, cache: Path, mesh: Mesh, config: Any) -> "Feed":
        """Prepare the data in the folder `cache` on process 0 and open them on every process of a run.

        Raises:
          UserError: the data cannot be used.
        """
        agreement.first(lambda: data.prepare(cache))
        source, heldout_source = data.examples("train", cache), data.examples("heldout", cache)
        share, evaluation = Share(config.batch_size, mesh), config.evaluation
        rows = {"global_batch_size": config.batch_size, "rows": share.rows}
        train = Batches(source, seed=config.seed, augment=dataset.augment(data), **rows)
        heldout = HeldoutBatches(heldout_source, limit=evaluation.batches, sample=evaluation.sample, **rows)
        return cls(
            len(source),
            dataset.fingerprint(data, cache),
            min(len(heldout_source), len(heldout) * config.batch_size),
            dataset.decoder(data, cache),
            jax.tree.map(_spec, share.to_devices(train[0])),
            train,
            heldout,
            share,
        )

    def train(self, number: int) -> Iterator[Any]:
        """Yield training batches `number`, `number` + 1, ... without end."""
        return map(self._share.to_devices, self._train.from_step(number))

    def heldout(self) -> Iterator[Any]:
        """Yield the held-out batches once."""
        return map(self._share.to_devices, self._heldout)


def _spec(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
