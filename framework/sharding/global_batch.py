"""The global batch: row r is example r of the step on any mesh and any number of processes."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from . import meshes


def spec(
    example: Mapping[str, jax.ShapeDtypeStruct], global_batch_size: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes and shardings of a global batch of examples without batch dimension."""
    sharding = meshes.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(
            (global_batch_size, *leaf.shape), jax.dtypes.canonicalize_dtype(leaf.dtype), sharding=sharding
        )
        for name, leaf in example.items()
    }


class Share:
    """The rows of the global batches that the devices of this process hold.

    Devices of several processes may hold the same rows, as where the tensor axis crosses hosts: each process reads
    them. Devices of one process share what it has read.

    Attributes:
      rows: numbers of these rows in a global batch, rising, each once.
    """

    def __init__(self, global_batch_size: int, mesh: Mesh):
        """`meshes.check_batch` has passed the batch size."""
        self._size, self._sharding = global_batch_size, meshes.batch_sharding(mesh)
        held = self._sharding.addressable_devices_indices_map((global_batch_size,)).values()
        self.rows = np.unique(np.concatenate([np.arange(global_batch_size)[index] for index in held]))

    def to_devices(self, local: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The global batch, laid over the mesh, of which this process gives `rows`.

        Args:
          local: arrays [len(rows), ...].

        Returns:
          Arrays [global_batch_size, ...] with `meshes.batch_sharding`.
        """
        return {name: self._lay(array) for name, array in local.items()}

    def _lay(self, local: np.ndarray) -> jax.Array:
        def of_device(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(self._size)
            first = np.searchsorted(self.rows, start)
            return local[first : first + stop - start]

        return jax.make_array_from_callback((self._size, *local.shape[1:]), self._sharding, of_device)
