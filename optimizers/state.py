"""The state of Distributed Shampoo: what it holds, and where each part lies."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from .exchange import Owners
from .host.in_flight import InFlight, in_flight_spec
from .kept import Roots, initial_roots, preconditioner_of
from .options import Options
from .plan import patterns
from .plan.blocks import Bucket, Plan
from .update import moments
from .update.moments import Moments

# Smaller diagonal states are not worth the latency of spreading them over the devices.
SPREAD_FROM = 2**16


class BucketState(NamedTuple):
    """State of a bucket; axis 0 of every array numbers the slots, whose devices own the blocks.

    Attributes:
      block: [n] int32, which block of the bucket is in each slot; the number of blocks where the slot is empty.
      moments: momentum and second moment of the blocks.
      roots: statistics and roots.
      gathered: sum of the gradients since the statistics were last renewed; None where they are renewed every step.
      graft_ratio: [n] float32, what the newest direction was multiplied by to have the graft's norm; 0 for blocks that
        act by the graft method.
      in_flight: in a checkpoint of the host schedule, statistics whose roots are still to come; otherwise None.
    """

    block: jax.Array
    moments: Moments
    roots: Roots
    gathered: jax.Array | None
    graft_ratio: jax.Array
    in_flight: InFlight | None = None


class ShampooState(NamedTuple):
    """State of Distributed Shampoo.

    Attributes:
      count: int32, steps taken.
      skipped: int32, updates refused because a gradient, its squares or the update were not finite; such a step
        changes nothing else.
      buckets: bucket name -> its state.
      diagonal: path (joined with dots) -> moments of a parameter under diagonal treatment.
    """

    count: jax.Array
    skipped: jax.Array
    buckets: dict[str, BucketState]
    diagonal: dict[str, Moments]


class Layout:
    """Where the state of one plan lies.

    Args:
      plan: of the parameters.
      owners: the devices.
      options: decide which arrays there are.
    """

    def __init__(self, plan: Plan, owners: Owners, options: Options):
        self.plan = plan
        self.owners = owners
        self.options = options

    def initial(self, params: Any) -> Any:
        """The state before the first step."""
        state = self.zeros(params)
        buckets = {
            bucket.name: state.buckets[bucket.name]._replace(block=jnp.asarray(bucket.slots.reshape(-1)))
            for bucket in self.plan.buckets
        }
        if self.owners.mesh is not None:
            by_block = self.owners.sharding(self.owners.by_block)
            buckets = jax.tree.map(lambda x: lax.with_sharding_constraint(x, by_block), buckets)
        return state._replace(buckets=buckets)

    def zeros(self, params: Any, *, saved: bool = False) -> ShampooState:
        """The state with nothing in it; `saved` is the form that checkpoints have."""
        leaves, plan = jax.tree.leaves(params), self.plan

        def bucket_state(bucket: Bucket) -> BucketState:
            n = bucket.slots.size
            return BucketState(
                block=jnp.zeros(n, jnp.int32),
                moments=moments.initial_moments(
                    (n, *bucket.shape), self.options, grafts=preconditioner_of(bucket).grafts
                ),
                roots=initial_roots(bucket, n, self.options),
                gathered=jnp.zeros((n, *bucket.shape), jnp.float32) if self.options.statistics_every > 1 else None,
                graft_ratio=jnp.zeros(n, jnp.float32),
                in_flight=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), in_flight_spec(bucket, n))
                if saved and self.options.refresh == "host" and bucket.sides
                else None,
            )

        return ShampooState(
            count=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            buckets={bucket.name: bucket_state(bucket) for bucket in plan.buckets},
            diagonal={
                patterns.state_key(leaf.path): moments.initial_row_moments(leaves[i].shape)
                if leaf.by_row
                else moments.initial_moments(leaves[i].shape, self.options)
                for i, leaf in plan.diagonal.items()
            },
        )

    def shardings(self, params: Any, *, saved: bool = False) -> Any:
        """A tree of shardings shaped like the state, or like its saved form."""
        state = jax.eval_shape(lambda params: self.zeros(params, saved=saved), params)
        mesh = self.owners.mesh
        if mesh is None:
            single = SingleDeviceSharding(jax.devices()[0])
            return jax.tree.map(lambda _: single, state)
        replicated = NamedSharding(mesh, PartitionSpec())
        by_block = self.owners.sharding(self.owners.by_block)
        leaves = jax.tree.leaves(params)
        diagonal = {}
        for index, kept in self.plan.diagonal.items():
            leaf = leaves[index]
            own = getattr(leaf, "sharding", None)
            spec = own.spec if isinstance(own, NamedSharding) else PartitionSpec()
            key = patterns.state_key(kept.path)
            lies = PartitionSpec(*spec[: leaf.ndim - 1]) if kept.by_row else _spread(spec, leaf.shape, mesh)
            diagonal[key] = jax.tree.map(lambda _, lies=lies: NamedSharding(mesh, lies), state.diagonal[key])
        return ShampooState(
            count=replicated,  # type: ignore
            skipped=replicated,  # type: ignore
            buckets=jax.tree.map(lambda _: by_block, state.buckets),
            diagonal=diagonal,
        )

    def saved_spec(self, params: Any) -> ShampooState:
        """The state as a checkpoint holds it: ShapeDtypeStructs with shardings."""
        shardings = self.shardings(params, saved=True)
        state = jax.eval_shape(lambda params: self.zeros(params, saved=True), params)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
        )


def _spread(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The spec with the mesh axes it does not use added to the first axis of the array that they divide."""
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
