"""Where activations lie: constraints for models, which see no mesh but the one in the context (`jax.set_mesh`)."""

import math

import jax
from jax.sharding import PartitionSpec as P

EXPERT_AXIS = "expert"  # the mesh axis that divides experts, and outside of them examples
BATCH_AXES = ("data", "fsdp", EXPERT_AXIS)  # mesh axes that divide the examples
SEQUENCE_AXIS = "sequence"  # the mesh axis that divides the positions


def shard_batch(x: jax.Array) -> jax.Array:
    """Lay an activation [B, ...] with its batch over the mesh axes of the context that divide a batch.

    Without it the partitioner follows the parameters, whose embed dimension fsdp shards, and reduces activations
    instead of gathering weights: 393 MB of collectives in a step against 53 MB (embed_dim 256, 4 layers, 32 rows of
    128 tokens, fsdp 8), 143 MB against 64 MB (data 2, fsdp 2, tensor 2). It does nothing without a mesh in the context
    (`jax.set_mesh`) and where the batch does not divide.
    """
    axes = batch_axes(x.shape[0])
    return _lay(x, P(axes, *(None for _ in x.shape[1:]))) if axes else x


def shard_tokens(x: jax.Array) -> jax.Array:
    """Lay an activation [B, T, ...] as `shard_batch` does, and its positions over the sequence axis, if both divide."""
    axes = batch_axes(x.shape[0])
    return _lay(x, P(axes, _sequence(x.shape[1]), *(None for _ in x.shape[2:]))) if axes else x


def shard_experts(x: jax.Array) -> jax.Array:
    """Lay what experts work on, [B, X, N, ...] with N groups of a row, where the experts X are.

    From where `shard_groups` lays it this is an all-to-all over the expert axis: examples that the axis divides come
    together, and experts part. Without it the partitioner may gather the weights of all experts instead.
    """
    axes = batch_axes(x.shape[0])
    experts = _sizes((EXPERT_AXIS,)).get(EXPERT_AXIS, 1)
    if experts == 1 or x.shape[1] % experts or not axes:
        return shard_groups(x)
    others = tuple(axis for axis in axes if axis != EXPERT_AXIS)
    return _lay(x, P(others, EXPERT_AXIS, _sequence(x.shape[2]), *(None for _ in x.shape[3:])))


def shard_groups(x: jax.Array) -> jax.Array:
    """Lay [B, X, N, ...] where the groups N of each row are: over the batch and sequence axes."""
    axes = batch_axes(x.shape[0])
    return _lay(x, P(axes, None, _sequence(x.shape[2]), *(None for _ in x.shape[3:]))) if axes else x


def gather_columns(x: jax.Array) -> jax.Array:
    """Whole rows of a table [V, E] on every device, for looking them up; the rows stay divided as they are."""
    return _lay(x, P(P.UNCONSTRAINED, None)) if _sizes(BATCH_AXES) else x


def batch_axes(rows: int) -> tuple[str, ...]:
    """The axes of the mesh in the context that divide a batch of so many rows; none where they do not divide it."""
    sizes = _sizes(BATCH_AXES)
    return tuple(sizes) if rows % math.prod(sizes.values()) == 0 else ()


def sequence_parts(length: int) -> int:
    """Into how many parts the mesh in the context divides so many positions; 1 where it does not divide them."""
    parts = _sizes((SEQUENCE_AXIS,)).get(SEQUENCE_AXIS, 1)
    return parts if length % parts == 0 else 1


def check_sequence(length: int) -> None:
    """The mesh in the context must divide the positions evenly.

    Raises:
      ValueError: it does not; the message names the nearest lengths that work.
    """
    parts = _sizes((SEQUENCE_AXIS,)).get(SEQUENCE_AXIS, 1)
    if length % parts:
        below, above = length // parts * parts, -(-length // parts) * parts
        fix = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"rows of {length} tokens are not divisible by mesh.sequence {parts}; use {fix}")


def _sequence(length: int) -> str | None:
    return SEQUENCE_AXIS if sequence_parts(length) > 1 else None


def _sizes(axes: tuple[str, ...]) -> dict[str, int]:
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: mesh.shape[axis] for axis in axes if axis in mesh.axis_names}


def _lay(x: jax.Array, spec: P) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, spec)
