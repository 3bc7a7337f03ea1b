"""Embedding tables concatenated to one array, sharded by rows over all devices, and a lookup that does not move it.

Shapes: R rows of all tables, D their width, B batch, F categories of an example, one for each table.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from .layout import SLICE_AXIS

ROW_AXES = ("data", "fsdp", "tensor")  # mesh axes that shard the rows, in this order
BATCH_AXES = ("data", "fsdp")  # those of them that shard the batch
_GRANULE = 2048  # the number of rows is rounded up to a multiple, so that any usual number of devices divides it


def total_rows(sizes: Sequence[int]) -> int:
    """Return the number of rows of the array that holds tables of these sizes."""
    return math.ceil(sum(sizes) / _GRANULE) * _GRANULE


def row_numbers(categories_BxF: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """Return the rows int32 [B, F] of categories' 32-bit hashes: each hash modulo the size of its table."""
    starts = np.cumsum([0, *sizes[:-1]], dtype=np.int64).astype(np.int32)
    within_BxF = categories_BxF.astype(jnp.uint32) % np.asarray(sizes, np.uint32)
    return within_BxF.astype(jnp.int32) + starts


def initial_tables(key: jax.Array, sizes: Sequence[int], width: int) -> jax.Array:
    """Return initial values, float32 [R, D], uniform between -1 / sqrt(n) and 1 / sqrt(n) for a table of n rows."""
    row_Rx1 = lax.broadcasted_iota(jnp.int32, (total_rows(sizes), 1), 0)
    bound_Rx1 = jnp.zeros(row_Rx1.shape, jnp.float32)
    start = 0
    for size in sizes:
        own = (row_Rx1 >= start) & (row_Rx1 < start + size)
        bound_Rx1 = jnp.where(own, size**-0.5, bound_Rx1)
        start += size
    return bound_Rx1 * jax.random.uniform(key, (total_rows(sizes), width), minval=-1, maxval=1)


def look_up(table_RxD: jax.Array, rows_BxF: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return rows of the array, [B, F, D] in `dtype`, with the batch sharded over the mesh of the context.

    Each device gathers the rows of the whole batch that it holds, zeros for the others; a reduce-scatter sums and
    distributes them. B F D numbers travel in the compute dtype, and as many for the gradient; the table does not move.
    The automatic partitioner would all-reduce, which costs twice that.

    The rows must be sharded over all of `ROW_AXES`. Without a mesh, or if their number does not divide, it is an
    ordinary lookup.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in ROW_AXES if axis in mesh.axis_names and mesh.shape[axis] > 1)
    batch_axes = tuple(axis for axis in axes if axis in BATCH_AXES)
    # Each slice holds the whole table and looks up its own part of the batch.
    slices = tuple(axis for axis in (SLICE_AXIS,) if axis in mesh.axis_names)
    parts, batch_parts = (math.prod(mesh.shape[axis] for axis in some) for some in (axes, (*slices, *batch_axes)))
    if parts == 1 or table_RxD.shape[0] % parts or rows_BxF.shape[0] % batch_parts:
        return table_RxD[rows_BxF].astype(dtype)
    others = tuple(axis for axis in axes if axis not in batch_axes)

    def local(own_rxD: jax.Array, rows_bxF: jax.Array) -> jax.Array:
        count = own_rxD.shape[0]
        all_BxF = lax.all_gather(rows_bxF, batch_axes, tiled=True) if batch_axes else rows_bxF
        within_BxF = all_BxF - lax.axis_index(axes) * count
        # Rows beyond the end read as zeros, and their gradients are dropped.
        within_BxF = jnp.where((within_BxF >= 0) & (within_BxF < count), within_BxF, count)
        found = own_rxD.at[within_BxF].get(mode="fill", fill_value=0).astype(dtype)
        if batch_axes:
            found = lax.psum_scatter(found, batch_axes, scatter_dimension=0, tiled=True)
        return lax.psum(found, others) if others else found

    divided = P((*slices, *batch_axes) or None)
    return jax.shard_map(local, in_specs=(P(axes), divided), out_specs=divided)(table_RxD, rows_BxF)
