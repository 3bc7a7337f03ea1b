"""Moves blocks between the parameters' layout and their owners: one all-to-all each way per bucket.

Outside `shard_map` every block of a parameter lies flattened, sliced evenly over all devices. Inside, the slices of a
bucket's parameters are joined locally and one all-to-all brings whole blocks to their owners. (Joining blocks along
a sharded axis under the automatic partitioner instead costs a permutation per block.)
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .blocks import Bucket


class Owners:
    """The devices of a mesh as owners of blocks; without a mesh, the one device that owns them all.

    Args:
      mesh: all of its axes together number the owners, in the order of its axis names.
    """

    def __init__(self, mesh: Mesh | None):
        self.mesh = mesh
        self.axes = tuple(mesh.axis_names) if mesh is not None else ()
        self.count = mesh.size if mesh is not None else 1

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """A sharding over the owners' mesh."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, spec)

    @property
    def by_block(self) -> PartitionSpec:
        """Axis 0 (the blocks) over all devices."""
        return PartitionSpec(self.axes)

    @property
    def sliced(self) -> PartitionSpec:
        """Axis 1 (the elements of a block) over all devices."""
        return PartitionSpec(None, self.axes)

    def slice_blocks(self, blocks: jax.Array) -> jax.Array:
        """Flattened blocks [blocks, elements], padded so that they divide, each sliced over all devices."""
        if self.mesh is None:
            return blocks
        elements = blocks.shape[1]
        padding = math.ceil(elements / self.count) * self.count - elements
        padded = jnp.pad(blocks, ((0, 0), (0, padding)))
        return lax.with_sharding_constraint(padded, self.sharding(self.sliced))

    def run(self, local: Callable[..., Any], sliced: Any, owned: Any, shared: Any) -> tuple[Any, Any, Any]:
        """Call `local(sliced, owned, shared)` on every device on what is its own.

        Args:
          local: returns (sliced, owned, shared), laid out as its arguments are.
          sliced: tree of arrays made by `slice_blocks`.
          owned: tree of arrays whose axis 0 is a bucket's block axis.
          shared: tree of replicated arrays.
        """
        if self.mesh is None:
            return local(sliced, owned, shared)
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(self.sliced, self.by_block, PartitionSpec()),
            out_specs=(self.sliced, self.by_block, PartitionSpec()),
            check_vma=False,  # eigh's scan carries change their varying axes and fail the check
        )(sliced, owned, shared)

    def to_owners(self, slices: Sequence[jax.Array], bucket: Bucket) -> jax.Array:
        """Inside `run`: the slices of a bucket's parameters become own blocks [slots per device, rows, cols]."""
        joined = jnp.concatenate([*slices, jnp.zeros_like(slices[0][:1])])
        joined = joined[bucket.slots.reshape(-1)]
        if self.mesh is not None:
            joined = lax.all_to_all(joined, self.axes, split_axis=0, concat_axis=1, tiled=True)
        elements = bucket.rows * bucket.cols
        return joined[:, :elements].reshape(-1, bucket.rows, bucket.cols)

    def from_owners(self, blocks_nrc: jax.Array, bucket: Bucket) -> list[jax.Array]:
        """Inside `run`: own blocks become the slices of the bucket's parameters, in the order of its leaves."""
        joined = blocks_nrc.reshape(blocks_nrc.shape[0], -1)
        if self.mesh is not None:
            elements = joined.shape[1]
            padding = math.ceil(elements / self.count) * self.count - elements
            joined = jnp.pad(joined, ((0, 0), (0, padding)))
            joined = lax.all_to_all(joined, self.axes, split_axis=1, concat_axis=0, tiled=True)
        slices, first = [], 0
        for leaf in bucket.leaves:
            slices.append(joined[bucket.slot_of_block[first : first + leaf.blocks]])
            first += leaf.blocks
        return slices

    def sum(self, x: jax.Array) -> jax.Array:
        """Inside `run`: the sum over all owners, replicated."""
        return lax.psum(x, self.axes) if self.mesh is not None else x
