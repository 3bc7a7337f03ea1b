"""The state of Distributed Shampoo: its arrays and their shardings."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from .exchange import Owners
from .host.in_flight import InFlight, in_flight_spec
from .linalg.symmetric import packed_shape
from .options import Options
from .plan import patterns
from .plan.blocks import Bucket, Plan
from .preconditioners.base import NO_GRADIENT, PreconditionerState
from .update import moments
from .update.moments import Moments

# Number of elements from which a diagonal state is spread over devices; below it, latency outweighs the memory saved.
SPREAD_FROM = 2**16


class BucketState(NamedTuple):
    """State of a bucket. Axis 0 of every array is the slots, sharded over the owners of the blocks.

    Attributes:
      block: [n] int32, index of the block in each slot; the number of blocks for an empty slot.
      moments: momentum and second moment of the blocks.
      roots: statistics and roots of the blocks.
      gathered: [n, *shape] float32, sum of gradients since the last update of the statistics; None if they are updated
        every step.
      graft_ratio: [n] float32, factor from the latest preconditioned direction to the graft's norm; 0 for blocks that
        use the graft method.
      in_flight: statistics whose roots the host is still computing, in checkpoints of the host schedule; else None.
    """

    block: jax.Array
    moments: Moments
    roots: PreconditionerState
    gathered: jax.Array | None
    graft_ratio: jax.Array
    in_flight: InFlight | None = None


class ShampooState(NamedTuple):
    """State of Distributed Shampoo.

    Attributes:
      count: int32, number of accepted steps.
      skipped: int32, number of skipped steps: a gradient, its square or the update was not finite. A skipped step
        changes nothing else.
      buckets: bucket name -> state.
      diagonal: path joined with dots -> moments, for parameters under diagonal treatment.
    """

    count: jax.Array
    skipped: jax.Array
    buckets: dict[str, BucketState]
    diagonal: dict[str, Moments]


def initial_state(plan: Plan, owners: Owners, options: Options, params: Any) -> ShampooState:
    """Return the state before the first step."""
    state = _zeros(plan, options, params)
    buckets = {
        bucket.name: state.buckets[bucket.name]._replace(block=jnp.asarray(bucket.slots.reshape(-1)))
        for bucket in plan.buckets
    }
    if owners.mesh is not None:
        by_block = owners.sharding(owners.by_block)
        buckets = jax.tree.map(lambda x: lax.with_sharding_constraint(x, by_block), buckets)
    return state._replace(buckets=buckets)


def state_shardings(plan: Plan, owners: Owners, options: Options, params: Any, *, saved: bool = False) -> Any:
    """Return a tree of shardings shaped like the state, or if `saved` like the state in checkpoints."""
    state = jax.eval_shape(lambda params: _zeros(plan, options, params, saved=saved), params)
    mesh = owners.mesh
    if mesh is None:
        single = SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: single, state)
    leaves, diagonal = jax.tree.leaves(params), {}
    for index, kept in plan.diagonal.items():
        leaf = leaves[index]
        own = getattr(leaf, "sharding", None)
        spec = own.spec if isinstance(own, NamedSharding) else PartitionSpec()
        key = patterns.state_key(kept.path)
        lies = PartitionSpec(*spec[: leaf.ndim - 1]) if kept.by_row else _spread(spec, leaf.shape, mesh)
        diagonal[key] = jax.tree.map(lambda _, lies=lies: NamedSharding(mesh, lies), state.diagonal[key])
    replicated: Any = NamedSharding(mesh, PartitionSpec())
    by_block = owners.sharding(owners.by_block)
    return ShampooState(replicated, replicated, jax.tree.map(lambda _: by_block, state.buckets), diagonal)


def saved_spec(plan: Plan, owners: Owners, options: Options, params: Any) -> ShampooState:
    """Return ShapeDtypeStructs with shardings for the state in checkpoints, including roots in flight."""
    shardings = state_shardings(plan, owners, options, params, saved=True)
    state = jax.eval_shape(lambda params: _zeros(plan, options, params, saved=True), params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
    )


def _zeros(plan: Plan, options: Options, params: Any, *, saved: bool = False) -> ShampooState:
    leaves = jax.tree.leaves(params)
    return ShampooState(
        count=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        buckets={bucket.name: _bucket_zeros(bucket, options, saved=saved) for bucket in plan.buckets},
        diagonal={
            patterns.state_key(leaf.path): moments.initial_row_moments(leaves[i].shape)
            if leaf.by_row
            else moments.initial_moments(leaves[i].shape, options)
            for i, leaf in plan.diagonal.items()
        },
    )


def _bucket_zeros(bucket: Bucket, options: Options, *, saved: bool) -> BucketState:
    n, shape = bucket.slots.size, bucket.shape
    lengths = [shape[side] for side in bucket.sides]
    preconditioner = bucket.preconditioner

    # Each field needs its own array: an array that occurs twice cannot be donated.
    def floats() -> jax.Array:
        return jnp.zeros(n, jnp.float32)

    def ints() -> jax.Array:
        return jnp.zeros(n, jnp.int32)

    in_flight = None
    if saved and options.refresh == "host" and bucket.sides:
        in_flight = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), in_flight_spec(bucket, n))
    return BucketState(
        block=ints(),
        moments=moments.initial_moments((n, *shape), options, grafts=preconditioner.grafts),
        roots=PreconditionerState(
            statistics=tuple(jnp.zeros((n, *packed_shape(r)), jnp.float32) for r in lengths),
            scale_log2=jnp.full(n, NO_GRADIENT, jnp.int32),
            roots=tuple(jnp.zeros((n, r, r), options.roots_dtype) for r in lengths),
            roots_scale_log2=ints(),
            second_moment=jnp.zeros((n, *shape), jnp.float32) if preconditioner.adapts else None,
            residual=floats(),
            condition=floats(),
            effective_rank=floats(),
            refreshed=ints(),
            failures=ints(),
            refreshes=ints(),
        ),
        gathered=jnp.zeros((n, *shape), jnp.float32) if options.statistics_every > 1 else None,
        graft_ratio=floats(),
        in_flight=in_flight,
    )


def _spread(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Return the spec with its unused mesh axes added to the first array axis that they divide."""
    entries: list[tuple[str, ...]] = []
    for entry in (*spec, *[None] * (len(shape) - len(spec))):
        entries.append(() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry))
    used = {name for entry in entries for name in entry}
    free = tuple(name for name in mesh.axis_names if name not in used and mesh.shape[name] > 1)
    if math.prod(shape) < SPREAD_FROM or not free:
        return spec
    for axis, entry in enumerate(entries):
        parts = math.prod(mesh.shape[name] for name in (*entry, *free))
        if shape[axis] % parts == 0:
            entries[axis] = (*entry, *free)
            return PartitionSpec(*[entry or None for entry in entries])
    return spec
