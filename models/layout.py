"""Where activations lie on the mesh of the context: their batch over the axes that divide a batch."""

import math

import jax
from jax.sharding import PartitionSpec as P


def shard_batch(x: jax.Array) -> jax.Array:
    """Lay an activation [B, ...] with its batch over the mesh axes of the context that divide a batch.

    Without it the partitioner follows the parameters, whose embed dimension fsdp shards, and reduces activations
    instead of gathering weights: 393 MB of collectives in a step against 53 MB (embed_dim 256, 4 layers, 32 rows of
    128 tokens, fsdp 8), 143 MB against 64 MB (data 2, fsdp 2, tensor 2). It does nothing without a mesh in the context
    (`jax.set_mesh`) and where the batch does not divide.
    """
    axes, parts = _batch_axes()
    if not axes or x.shape[0] % parts:
        return x
    return jax.lax.with_sharding_constraint(x, P(axes, *(None for _ in x.shape[1:])))


def gather_columns(x: jax.Array) -> jax.Array:
    """Whole rows of a table [V, E] on every device, for looking them up; the rows stay divided as they are."""
    if not _batch_axes()[0]:
        return x
    return jax.lax.with_sharding_constraint(x, P(P.UNCONSTRAINED, None))


def _batch_axes() -> tuple[tuple[str, ...], int]:
    """The axes of the mesh in the context that divide a batch, and into how many parts."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in ("data", "fsdp") if axis in mesh.axis_names)
    return axes, math.prod(mesh.shape[axis] for axis in axes)
