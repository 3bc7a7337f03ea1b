"""Sharding constraints of activations, on the mesh in the context (`jax.set_mesh`)."""

import math

import jax
from jax.sharding import PartitionSpec as P

EXPERT_AXIS = "expert"  # mesh axis that shards experts, and elsewhere examples
BATCH_AXES = ("data", "fsdp", EXPERT_AXIS)  # mesh axes that shard the examples
SEQUENCE_AXIS = "sequence"  # mesh axis that shards the positions


def shard_batch(x: jax.Array) -> jax.Array:
    """Shard the batch of an activation [B, ...] over the batch axes; no effect without a mesh or if B does not divide.

    Otherwise the partitioner follows the parameters, whose embed dimension fsdp shards, and reduces activations instead
    of gathering weights: 393 MB of collectives in a step against 53 MB (embed_dim 256, 4 layers, 32 rows of 128 tokens,
    fsdp 8), 143 MB against 64 MB (data 2, fsdp 2, tensor 2).
    """
    axes = batch_axes(x.shape[0])
    return _lay(x, P(axes, *(None for _ in x.shape[1:]))) if axes else x


def shard_tokens(x: jax.Array) -> jax.Array:
    """Shard an activation [B, T, ...] as `shard_batch` does, and its positions over the sequence axis."""
    axes = batch_axes(x.shape[0])
    return _lay(x, P(axes, _sequence(x.shape[1]), *(None for _ in x.shape[2:]))) if axes else x


def shard_experts(x: jax.Array) -> jax.Array:
    """Shard the input or output of experts, [B, X, N, ...] with N groups of a row, over the experts X.

    After `shard_groups` this is an all-to-all over the expert axis. Without it the partitioner may gather the weights
    of all experts instead.
    """
    axes = batch_axes(x.shape[0])
    experts = _sizes((EXPERT_AXIS,)).get(EXPERT_AXIS, 1)
    if experts == 1 or x.shape[1] % experts or not axes:
        return shard_groups(x)
    others = tuple(axis for axis in axes if axis != EXPERT_AXIS)
    return _lay(x, P(others, EXPERT_AXIS, _sequence(x.shape[2]), *(None for _ in x.shape[3:])))


def shard_groups(x: jax.Array) -> jax.Array:
    """Shard [B, X, N, ...] over the batch axes and its groups N over the sequence axis."""
    axes = batch_axes(x.shape[0])
    return _lay(x, P(axes, None, _sequence(x.shape[2]), *(None for _ in x.shape[3:]))) if axes else x


def gather_columns(x: jax.Array) -> jax.Array:
    """Gather whole rows of a table [V, E] for lookups; the sharding of V stays."""
    return _lay(x, P(P.UNCONSTRAINED, None)) if _sizes(BATCH_AXES) else x


def batch_axes(rows: int) -> tuple[str, ...]:
    """Return the mesh axes that shard a batch of `rows`; none if `rows` does not divide."""
    sizes = _sizes(BATCH_AXES)
    return tuple(sizes) if rows % math.prod(sizes.values()) == 0 else ()


def sequence_parts(length: int) -> int:
    """Return the number of shards of `length` positions; 1 if `length` does not divide."""
    parts = _sizes((SEQUENCE_AXIS,)).get(SEQUENCE_AXIS, 1)
    return parts if length % parts == 0 else 1


def check_sequence(length: int) -> None:
    """Raise ValueError if the sequence axis does not divide `length` positions; it names the nearest valid lengths."""
    parts = _sizes((SEQUENCE_AXIS,)).get(SEQUENCE_AXIS, 1)
    if length % parts:
        below, above = length // parts * parts, -(-length // parts) * parts
        fix = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"mesh.sequence={parts}: must divide rows of {length} tokens; use rows of {fix}")


def _sequence(length: int) -> str | None:
    return SEQUENCE_AXIS if sequence_parts(length) > 1 else None


def _sizes(axes: tuple[str, ...]) -> dict[str, int]:
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: mesh.shape[axis] for axis in axes if axis in mesh.axis_names}


def _lay(x: jax.Array, spec: P) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, spec)
