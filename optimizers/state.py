"""The state of Distributed Shampoo, and the static layout that it carries."""

import dataclasses
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from . import diagonal
from .checkpoint.inheritance import Inheritance
from .checkpoint.manifest import describe
from .diagnostics import by_block, by_layer, diagnose
from .diagonal import Moments
from .exchange import Owners
from .host.in_flight import InFlight, in_flight_spec
from .host.parcels import Parcels
from .host.service import Event, HostRoots
from .linalg.symmetric import packed_shape
from .options import Options
from .plan import patterns
from .plan.blocks import Bucket, Parameter, Plan, make_plan, parameters
from .preconditioners.base import NO_GRADIENT, PreconditionerState

# Number of elements from which a diagonal state is spread over devices; below it, latency outweighs the memory saved.
SPREAD_FROM = 2**16


class BucketState(NamedTuple):
    """State of a bucket. Axis 0 of every array is the slots, sharded over the owners of the blocks.

    Attributes:
      block: [n] int32, index of the block in each slot; the number of blocks for an empty slot.
      moments: momentum and second moment of the blocks.
      roots: statistics and roots of the blocks.
      graft_ratio: [n] float32, factor from the latest preconditioned direction to the graft's norm; 0 for blocks that
        use the graft method.
      in_flight: statistics whose roots the host is still computing, in checkpoints of the host schedule; else None.
    """

    block: jax.Array
    moments: Moments
    roots: PreconditionerState
    graft_ratio: jax.Array
    in_flight: InFlight | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Layout:
    """The static layout of a state: blocks of parameters, their owners and the options. It has no arrays.

    Layouts of equal parameters and options are equal, so that compiled functions are shared.

    Attributes:
      parameters: the parameters, in the order of their tree's leaves.
      options: options of the optimizer.
      mesh: mesh whose devices own the blocks; None for one device.
    """

    parameters: tuple[Parameter, ...]
    options: Options
    mesh: Mesh | None

    @classmethod
    def of(cls, params: Any, options: Options, mesh: Mesh | None, axis_names: Any, param_specs: Any) -> "Layout":
        """Return the layout for a tree of arrays or ShapeDtypeStructs; see `distributed_shampoo`."""
        if mesh is not None:
            _check_devices(params, mesh)
        return cls(parameters(params, axis_names, param_specs if mesh is not None else None), options, mesh)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Layout({len(self.parameters)} parameters, mesh={dict(self.owners.sizes)})"

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple((parameter.path, parameter.shape) for parameter in self.parameters))

    @functools.cached_property
    def owners(self) -> Owners:
        """Return the owners of the blocks."""
        return Owners(self.mesh)

    @functools.cached_property
    def plan(self) -> Plan:
        """Return the plan of the parameters."""
        platform = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        return make_plan(self.parameters, self.options, self.owners.sizes, platform)

    def initial(self) -> "ShampooState":
        """Return the state before the first step."""
        state, buckets = self._zeros(), self.plan.buckets
        by_name = {b.name: state.buckets[b.name]._replace(block=jnp.asarray(b.slots.reshape(-1))) for b in buckets}
        if self.mesh is not None:
            by_block = self.owners.sharding(self.owners.by_block)
            by_name = jax.tree.map(lambda x: lax.with_sharding_constraint(x, by_block), by_name)
        return dataclasses.replace(state, buckets=by_name)

    def shardings(self, params: Any, *, saved: bool = False) -> "ShampooState":
        """Return a tree of shardings shaped like the state, or if `saved` like the state in checkpoints.

        A diagonal state has its parameter's sharding, spread over mesh axes that the parameter does not use. A row-wise
        state is sharded like the rows.

        Args:
          params: tree of arrays or ShapeDtypeStructs with shardings that contains the parameters.
          saved: whether to include roots in flight.
        """
        state = jax.eval_shape(lambda: self._zeros(saved=saved))
        mesh, sizes = self.mesh, self.owners.sizes
        if mesh is None:
            single = SingleDeviceSharding(jax.devices()[0])
            return jax.tree.map(lambda _: single, state)
        leaves, moments = dict(zip(patterns.paths(params), jax.tree.leaves(params), strict=True)), {}
        replicated: Any = NamedSharding(mesh, PartitionSpec())
        for leaf in self.plan.diagonal.values():
            own = getattr(leaves[leaf.path], "sharding", None)
            spec = own.spec if isinstance(own, NamedSharding) else PartitionSpec()
            spec = PartitionSpec(*spec[: len(leaf.shape) - 1]) if leaf.by_row else _spread(spec, leaf.shape, sizes)
            spread, key = NamedSharding(mesh, spec), patterns.state_key(leaf.path)
            moments[key] = jax.tree.map(lambda _, spread=spread: spread, state.diagonal[key])._replace(age=replicated)
        by_block = self.owners.sharding(self.owners.by_block)
        buckets = jax.tree.map(lambda _: by_block, state.buckets)
        return ShampooState(replicated, replicated, buckets, moments, self)

    def is_sparse(self, path: str) -> bool:
        """Return whether the gradient of a row of a parameter changes nothing but this row and its sum."""
        leaf = next((leaf for leaf in self.plan.diagonal.values() if leaf.path == path), None)
        decays = self.options.weight_decay and patterns.first_match(self.options.decay_rules, path)
        return leaf is not None and leaf.by_row and not decays

    def row_sums(self, state: "ShampooState") -> dict[str, Any]:
        """Return path -> sums of the rows of each parameter under row-wise treatment."""
        leaves = [leaf for leaf in self.plan.diagonal.values() if leaf.by_row]
        return {leaf.path: state.diagonal[patterns.state_key(leaf.path)].second_moment for leaf in leaves}

    def with_row_sums(self, state: "ShampooState", sums: Mapping[str, jax.Array]) -> "ShampooState":
        """Return the state for parameters with other rows, whose sums are given by path."""
        moments = dict(state.diagonal)
        for path, sum_R in sums.items():
            key = patterns.state_key(path)
            moments[key] = moments[key]._replace(second_moment=sum_R)
        parameters = tuple(
            each._replace(shape=(len(sums[each.path]), *each.shape[1:])) if each.path in sums else each
            for each in self.parameters
        )
        layout = dataclasses.replace(self, parameters=parameters)
        if self in _HOSTED:
            layout.expect_host_roots()
        return dataclasses.replace(state, diagonal=moments, layout=layout)

    def saved_spec(self, params: Any) -> "ShampooState":
        """Return ShapeDtypeStructs with shardings for the state in checkpoints, including roots in flight."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(lambda: self._zeros(saved=True)),
            self.shardings(params, saved=True),
        )

    def manifest(self) -> dict[str, Any]:
        """Return the layout as JSON, to save beside the state and to pass to `inheritance`."""
        return describe(self.plan, self.options)

    def inheritance(
        self,
        manifest: Any,
        shapes: Mapping[str, tuple[int, ...]],
        renamed: Callable[[str], str] = lambda path: path,
    ) -> Inheritance:
        """Return the source of each array of a new state in a saved state; see `checkpoint.inheritance`."""
        return Inheritance(self.plan, self.options, manifest, shapes, renamed)

    def diagnostics(self, state: "ShampooState") -> dict[str, jax.Array]:
        """Return scalars about a state by name; see the module `diagnostics`."""
        return diagnose(state, self.options)

    def diagnostics_by_block(self, state: "ShampooState") -> dict[str, jax.Array]:
        """Return arrays about the blocks of a state, for `diagnostics_by_layer`; see the module `diagnostics`."""
        return by_block(state, self.options)

    def diagnostics_by_layer(self, found: Mapping[str, np.ndarray]) -> tuple[list[str], dict[str, np.ndarray]]:
        """Return names of layers, and metrics of each layer; see the module `diagnostics`."""
        return by_layer(self.plan.buckets, found)

    def host_roots(self, events: list[Event] | None = None) -> HostRoots | None:
        """Return the service that computes roots on the host around the steps, or None unless refresh is "host".

        Args:
          events: list to which the service appends a timeline, or None.
        """
        if self.options.refresh != "host":
            return None
        self.expect_host_roots()
        return HostRoots(self._parcels, self.options, events)

    def expect_host_roots(self) -> None:
        """Announce a service for this layout that is created after the step is traced."""
        _HOSTED.add(self)

    def check_host_roots(self) -> None:
        """Warn, once, if refresh is "host" and no service was created or announced."""
        if self.options.refresh == "host" and self not in _HOSTED and any(b.sides for b in self.plan.buckets):
            _HOSTED.add(self)
            warnings.warn(
                "refresh='host': no service computes roots, so all blocks use the graft method. Create it by "
                "tx.host_roots(params) before the first update and call its install and take around each step "
                "(docs/schedules.md), or use refresh='staggered'.",
                stacklevel=3,
            )

    @functools.cached_property
    def _parcels(self) -> Parcels:
        return Parcels(self.plan.buckets, self.owners, self.options)

    def _zeros(self, *, saved: bool = False) -> "ShampooState":
        moments = {
            patterns.state_key(leaf.path): diagonal.initial_rows(leaf.shape)
            if leaf.by_row
            else diagonal.initial(leaf.shape, self.options.of_diagonal)
            for leaf in self.plan.diagonal.values()
        }
        buckets = {bucket.name: _bucket_zeros(bucket, self.options, saved=saved) for bucket in self.plan.buckets}
        return ShampooState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), buckets, moments, self)


# Layouts with a service that computes roots on the host, and those for which a warning was given.
_HOSTED: weakref.WeakSet[Layout] = weakref.WeakSet()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["count", "skipped", "buckets", "diagonal"],
    meta_fields=["layout"],
)
@dataclasses.dataclass(frozen=True)
class ShampooState:
    """State of Distributed Shampoo.

    Attributes:
      count: int32, number of accepted steps.
      skipped: int32, number of skipped steps: a gradient, its square or the update was not finite. A skipped step
        changes nothing else.
      buckets: bucket name -> state.
      diagonal: path joined with dots -> moments, for parameters under diagonal treatment.
      layout: the static layout.
    """

    count: jax.Array
    skipped: jax.Array
    buckets: dict[str, BucketState]
    diagonal: dict[str, Moments]
    layout: Layout


def _bucket_zeros(bucket: Bucket, options: Options, *, saved: bool) -> BucketState:
    n, shape = bucket.slots.size, bucket.shape
    lengths = [shape[side] for side in bucket.sides]
    preconditioner = bucket.preconditioner

    # Each field needs its own array: an array that occurs twice cannot be donated.
    floats, ints = (functools.partial(jnp.zeros, n, dtype) for dtype in (jnp.float32, jnp.int32))
    in_flight = None
    if saved and options.refresh == "host" and bucket.sides:
        in_flight = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), in_flight_spec(bucket, n))
    return BucketState(
        block=ints(),
        moments=diagonal.initial((n, *shape), options.of_graft, age=(n,), second_moment=preconditioner.grafts),
        roots=PreconditionerState(
            statistics=tuple(jnp.zeros((n, *packed_shape(r)), jnp.float32) for r in lengths),
            scale_log2=jnp.full(n, NO_GRADIENT, jnp.int32),
            age=ints(),
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
        graft_ratio=floats(),
        in_flight=in_flight,
    )


def _check_devices(params: Any, mesh: Mesh) -> None:
    """Raise ValueError if a parameter was put on other devices than those of the mesh."""
    for path, leaf in zip(patterns.paths(params), jax.tree.leaves(params), strict=True):
        known = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
        if known and leaf.committed and not leaf.sharding.device_set <= set(mesh.devices.flat):
            raise ValueError(
                f"parameter {path!r}: is on {len(leaf.sharding.device_set)} devices, not all among the "
                f"{mesh.size} of the mesh. Put it on the mesh with jax.device_put."
            )


def _spread(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mapping[str, int]) -> PartitionSpec:
    """Return the spec with its unused mesh axes added to the first array axis that they divide."""
    entries: list[tuple[str, ...]] = []
    for entry in (*spec, *[None] * (len(shape) - len(spec))):
        entries.append(() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry))
    used = {name for entry in entries for name in entry}
    free = tuple(name for name in mesh if name not in used and mesh[name] > 1)
    if math.prod(shape) < SPREAD_FROM or not free:
        return spec
    for axis, entry in enumerate(entries):
        parts = math.prod(mesh[name] for name in (*entry, *free))
        if shape[axis] % parts == 0:
            entries[axis] = (*entry, *free)
            return PartitionSpec(*[entry or None for entry in entries])
    return spec
