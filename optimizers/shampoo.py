"""Distributed Shampoo as an optax gradient transformation, on one device or with blocks owned by all devices of a mesh.

The package `preconditioners` defines how blocks are preconditioned. Shampoo (Anil, Gupta, Koren, Regan and Singer,
"Scalable Second Order Optimization for Deep Learning", arXiv 2002.09018) does for a block G (r x c), per step:

    M <- beta1 M + (1 - beta1) G                               momentum
    U = L^(-1/p) M R^(-1/p), scaled to the graft's norm         with the roots of an earlier step
    L <- beta2 L + (1 - beta2) G G',  R the same with G' G     statistics
    for the blocks that are due: new roots of L and R, used from the next step on
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from .checkpoint.inheritance import Inheritance
from .checkpoint.manifest import describe
from .diagnostics import diagnose
from .exchange import Owners
from .host.parcels import Parcels
from .host.service import Event, HostRoots
from .linalg.newton import inner
from .linalg.scaling import exponent_of, power_of_two
from .options import Options
from .plan import patterns
from .plan.blocks import Bucket, Plan, make_plan
from .preconditioners.base import PreconditionerState
from .refresh import schedule
from .refresh.refresh import Due, accumulate, refresh
from .state import BucketState, ShampooState, initial_state, saved_spec, state_shardings
from .update import decay, moments, norms
from .update.finite import all_finite, largest


class _Tables(NamedTuple):
    """Static tables of a bucket, sharded over the owners; axis 0 is the slots or the devices."""

    routes: Any
    matrix: jax.Array
    elements: jax.Array
    sizes: jax.Array
    due: jax.Array


@dataclasses.dataclass(frozen=True)
class ShampooOptions(Options):
    """Options of Distributed Shampoo with `build`, for configs; `Options` has the fields."""

    def build(
        self,
        learning_rate: float | optax.Schedule,
        *,
        mesh: Mesh | None = None,
        axis_names: Any = None,
        param_specs: Any = None,
    ) -> "DistributedShampoo":
        """Return the optimizer; see `distributed_shampoo`."""
        return distributed_shampoo(learning_rate, self, mesh=mesh, axis_names=axis_names, param_specs=param_specs)


class DistributedShampoo(optax.GradientTransformation):
    """An optax gradient transformation with further methods for trainers; see `distributed_shampoo`.

    Args:
      learning_rate: a float or a schedule over the number of accepted steps.
      options: see ShampooOptions.
      mesh: mesh whose devices own the blocks, or None.
      axis_names: tree with a tuple of axis names per parameter, or None.
      param_specs: tree with a PartitionSpec per parameter, or None.
    """

    learning_rate: float | optax.Schedule
    options: Options
    owners: Owners
    axis_names: Any
    param_specs: Any
    _plans: dict[Any, Plan]
    _parcels: dict[int, Parcels]

    def __new__(cls, learning_rate, options: Options, mesh: Mesh | None, axis_names: Any, param_specs: Any):
        """Create the tuple (init, update) with further attributes."""
        self = super().__new__(
            cls,
            lambda params: initial_state(self.plan(params), self.owners, options, params),  # type: ignore
            lambda updates, state, params=None: self._update(updates, state, params),
        )
        self.learning_rate = learning_rate
        self.options = options
        self.owners = Owners(mesh)
        self.axis_names = axis_names
        self.param_specs = param_specs
        self._plans = {}
        self._parcels = {}
        if options.weight_decay and options.decay == "independent":
            decay.peak(learning_rate)
        return self

    def plan(self, params: Any) -> Plan:
        """Return the static plan for a tree of arrays or ShapeDtypeStructs."""
        key = tuple(
            (path, leaf.shape) for path, leaf in zip(patterns.paths(params), jax.tree.leaves(params), strict=True)
        )
        if key not in self._plans:
            specs = self.param_specs if self.owners.mesh is not None else None
            self._plans[key] = make_plan(params, self.axis_names, specs, self.options, self.owners.sizes)
        return self._plans[key]

    def treatments(self, params: Any) -> dict[str, str]:
        """Return path -> a short text that describes the treatment."""
        return self.plan(params).treatments

    def state_shardings(self, params: Any) -> ShampooState:
        """Return a tree of shardings shaped like the state.

        A diagonal state has its parameter's sharding, spread over mesh axes that the parameter does not use. A row-wise
        state is sharded like the rows.

        Args:
          params: arrays, or ShapeDtypeStructs with shardings.
        """
        return state_shardings(self.plan(params), self.owners, self.options, params)

    def saved_spec(self, params: Any) -> ShampooState:
        """Return ShapeDtypeStructs with shardings for the state in checkpoints, including roots in flight."""
        return saved_spec(self.plan(params), self.owners, self.options, params)

    def manifest(self, params: Any) -> dict[str, Any]:
        """Return the layout of the state as JSON, to save beside it and to pass to `inheritance`."""
        return describe(self.plan(params), self.options)

    def inheritance(
        self,
        params: Any,
        manifest: Any,
        shapes: Mapping[str, tuple[int, ...]],
        renamed: Callable[[str], str] = lambda path: path,
    ) -> Inheritance:
        """Return the source of each array of a new state in a saved state; see `checkpoint.inheritance`."""
        return Inheritance(self.plan(params), self.options, manifest, shapes, renamed)

    def diagnostics(self, state: ShampooState) -> dict[str, jax.Array]:
        """Return scalars about the state by name; see the module `diagnostics`."""
        return diagnose(state, self.options)

    def host_roots(self, params: Any, events: list[Event] | None = None) -> HostRoots | None:
        """Return the service that computes roots on the host around the steps, or None unless refresh is "host".

        Args:
          params: arrays or ShapeDtypeStructs.
          events: list to which the service appends a timeline, or None.
        """
        if self.options.refresh != "host":
            return None
        plan = self.plan(params)
        if id(plan) not in self._parcels:
            self._parcels[id(plan)] = Parcels(plan.buckets, self.owners, self.options)
        return HostRoots(self._parcels[id(plan)], self.options, events)

    def _update(self, grads: Any, state: Any, params: Any = None) -> tuple[Any, ShampooState]:
        options, owners = self.options, self.owners
        if options.weight_decay and params is None:
            raise ValueError("params=None: weight decay needs the parameters. Call update(grads, state, params).")
        plan = self.plan(grads)
        leaves, names = jax.tree.leaves(grads), patterns.paths(grads)
        coupled = options.decay == "coupled"
        gradients = decay.joined(leaves, params, names, options, self.learning_rate) if coupled else leaves
        step = state.count + 1
        directions: list[jax.Array] = [jnp.zeros(())] * len(leaves)

        diagonal, sizes = {}, []
        for i, leaf in plan.diagonal.items():
            key, g = patterns.state_key(leaf.path), gradients[i].astype(jnp.float32)
            if leaf.by_row:
                diagonal[key], directions[i] = moments.advance_rows(state.diagonal[key], g, options.epsilon)
            else:
                h = _unit(g) if options.normalizes else g
                diagonal[key], _, directions[i] = moments.advance(state.diagonal[key], h, step, leaf.beta2, options)
            # A square may overflow although the gradient and the direction do not, and would stay in the state.
            sizes.append(jnp.maximum(g * g, jnp.abs(directions[i])))
        finite = all_finite(sizes)

        tiles = {b.name: [owners.cut(gradients[leaf.index], leaf) for leaf in b.leaves] for b in plan.buckets}
        specs = {b.name: owners.specs(b) for b in plan.buckets}
        tables = {b.name: self._tables(b) for b in plan.buckets}
        tiles, buckets, accepted = owners.run(
            lambda tiles, owned, shared: self._owners_step(plan.buckets, tiles, *owned, *shared),
            tiles,
            specs,
            (state.buckets, tables),
            (step, finite),
        )
        for bucket in plan.buckets:
            for leaf, x in zip(bucket.leaves, tiles[bucket.name], strict=True):
                directions[leaf.index] = owners.join(x, leaf)

        rate = jnp.asarray(self.learning_rate(state.count) if callable(self.learning_rate) else self.learning_rate)
        if not coupled:
            directions = decay.joined(directions, params, names, options, self.learning_rate)
        updates = [
            jnp.where(accepted, -rate * patterns.first_match(options.rate_rules, name) * direction, 0).astype(
                leaf.dtype
            )
            for direction, leaf, name in zip(directions, leaves, names, strict=True)
        ]
        new_state = ShampooState(
            count=state.count + accepted,
            skipped=state.skipped + ~accepted,
            buckets=buckets,
            diagonal=_select(accepted, diagonal, state.diagonal),
        )
        return jax.tree.unflatten(jax.tree.structure(grads), updates), new_state

    def _tables(self, bucket: Bucket) -> _Tables:
        if self.options.graft_norm == "block":
            elements = np.maximum(np.prod(bucket.real_sizes, axis=1), 1)
        else:
            elements = bucket.elements_of_matrix[bucket.matrix_of_slot]
        return _Tables(
            routes=self.owners.tables(bucket),
            matrix=jnp.asarray(bucket.matrix_of_slot),
            elements=jnp.asarray(elements, jnp.float32),
            sizes=jnp.asarray(bucket.real_sizes),
            due=jnp.asarray(bucket.due),
        )

    def _owners_step(
        self,
        buckets: Sequence[Bucket],
        tiles: dict[str, list[jax.Array]],
        states: dict[str, BucketState],
        tables: dict[str, _Tables],
        step: jax.Array,
        finite: jax.Array,
    ) -> tuple[Any, Any, Any]:
        """Receive gradients, compute directions, and update statistics and due roots, on each device.

        The states stay unchanged if `finite` is False, a gradient is not finite or a direction overflows.

        Args:
          buckets: buckets of the plan.
          tiles: bucket name -> this device's tiles of the gradients.
          states: bucket name -> this device's slots.
          tables: bucket name -> tables of the plan.
          step: int32, number of this step, from 1.
          finite: bool, whether the gradients of diagonal parameters are finite.

        Returns:
          (tiles of the directions, new states, whether the step is accepted).
        """
        options, owners = self.options, self.owners
        gradients = {b.name: owners.to_owners(tiles[b.name], tables[b.name].routes, b) for b in buckets}
        length = owners.max(largest(gradients))
        # A square may overflow although the gradient does not.
        finite &= jnp.isfinite(length * length)
        # Compute norms and directions in units of the largest entry, so that squares stay within float32.
        scale_log2 = exponent_of(jnp.where(finite, length, 0))
        # LAPACK may hang on a NaN, even in a step that is skipped.
        gradients = {name: jnp.where(finite, g, 0) for name, g in gradients.items()}
        scaled = self._normalized(gradients, tables, buckets, scale_log2) if options.normalizes else gradients
        # Units of momentum and graft.
        unit = 0 if options.normalizes else scale_log2
        graft_unit = scale_log2 if options.graft != "none" and options.diagonal.follows_scale else 0
        new_moments, directions, adapted, grafts, acting, squares = {}, {}, {}, {}, {}, {}
        for bucket in buckets:
            name, state, preconditioner = bucket.name, states[bucket.name], bucket.preconditioner
            new_moments[name], momentum, graft = moments.advance(
                state.moments, scaled[name], step, bucket.treatment.beta2, options
            )
            if preconditioner.grafts:
                momentum = momentum * power_of_two(-unit)
            direction, adapted[name] = preconditioner.act(
                momentum, scaled[name], state.roots, bucket, tables[name].sizes, step, options
            )
            if preconditioner.grafts:
                # Grafting removes the scale, so grafted directions only need a unit that all blocks share.
                common = scale_log2 if norms.grafted(bucket, options) else 0
                change = preconditioner.degree(bucket) * (common - state.roots.roots_scale_log2)
                change += 0 if norms.grafted(bucket, options) else unit
                direction = direction * power_of_two(change).reshape(-1, *[1] * len(bucket.shape))
            directions[name], grafts[name] = direction, graft * power_of_two(-graft_unit)
            acting[name] = _acts(state.roots, bucket, options, step)
            own, wanted = _squares(direction), _squares(grafts[name])
            squares[name] = norms.Squares(
                own=jnp.where(acting[name], own, 0),
                wanted=jnp.where(acting[name], wanted if norms.grafted(bucket, options) else own, 0),
                rest=jnp.where(acting[name], 0, wanted),
            )
        elements = {name: table.elements for name, table in tables.items()}
        matrices = {name: table.matrix for name, table in tables.items()}
        by_roots, by_graft = norms.factors(squares, elements, matrices, buckets, owners, options, graft_unit)

        overflows, ratios = jnp.zeros((), jnp.int32), {}
        for bucket in buckets:
            name, ones = bucket.name, [1] * len(bucket.shape)
            lengths, ratio = by_roots[name], by_roots[name]
            if norms.grafted(bucket, options):
                lengths = lengths * power_of_two(graft_unit)
                own_unit = unit - bucket.preconditioner.degree(bucket) * scale_log2
                ratio = lengths * power_of_two(-own_unit)
            ratios[name] = jnp.where(acting[name], ratio, 0)
            graft_lengths = by_graft[name] * power_of_two(graft_unit)
            directions[name] = jnp.where(
                acting[name].reshape(-1, *ones),
                directions[name] * lengths.reshape(-1, *ones),
                grafts[name] * graft_lengths.reshape(-1, *ones),
            )
            overflows += ~all_finite(directions[name])
            if adapted[name] is not None:
                overflows += ~all_finite(adapted[name])
        accepted = finite & (owners.sum(overflows) == 0)
        roots = self._renew(buckets, states, gradients, tables, step, accepted, adapted)
        new_states = {
            b.name: states[b.name]._replace(
                moments=_select(accepted, new_moments[b.name], states[b.name].moments),
                roots=roots[b.name][0],
                gathered=roots[b.name][1],
                graft_ratio=jnp.where(accepted, ratios[b.name], states[b.name].graft_ratio),
            )
            for b in buckets
        }
        tiles = {b.name: owners.from_owners(directions[b.name], tables[b.name].routes, b) for b in buckets}
        return tiles, new_states, accepted

    def _normalized(
        self,
        gradients: dict[str, jax.Array],
        tables: dict[str, _Tables],
        buckets: Sequence[Bucket],
        scale_log2: jax.Array,
    ) -> dict[str, jax.Array]:
        """Return gradients divided by their norm over the matrix or the block."""
        gradients = {name: g * power_of_two(-scale_log2) for name, g in gradients.items()}
        squares = {name: _squares(g)[None] for name, g in gradients.items()}
        if self.options.graft_norm == "parameter":
            matrices = {name: table.matrix for name, table in tables.items()}
            squares = norms.over_matrices(squares, matrices, buckets, self.owners)
        return {
            b.name: gradients[b.name] * _reciprocal(jnp.sqrt(squares[b.name][0])).reshape(-1, *[1] * len(b.shape))
            for b in buckets
        }

    def _renew(
        self,
        buckets: Sequence[Bucket],
        states: dict[str, BucketState],
        gradients: dict[str, jax.Array],
        tables: dict[str, _Tables],
        step: jax.Array,
        accepted: jax.Array,
        adapted: dict[str, jax.Array | None],
    ) -> dict[str, tuple[PreconditionerState, jax.Array | None]]:
        """Return bucket name -> (statistics and roots after this step, gradients gathered for the next update)."""
        every = self.options.statistics_every
        roots, gathered = {}, {}
        for bucket in buckets:
            name, old, sizes = bucket.name, states[bucket.name].roots, tables[bucket.name].sizes
            before, g = states[name].gathered, gradients[name]
            if before is None:
                gathered[name], renewed = None, accumulate(old, g, bucket, sizes)
            else:
                total, due = before + g, step % every == 0
                gathered[name] = jnp.where(accepted, jnp.where(due, 0, total), before)
                renewed = lax.cond(
                    due,
                    functools.partial(accumulate, bucket=bucket, sizes=sizes),
                    lambda old, _: old,
                    old,
                    total / every,
                )
            changed = old._replace(
                statistics=_select(accepted, renewed.statistics, old.statistics),
                scale_log2=jnp.where(accepted, renewed.scale_log2, old.scale_log2),
            )
            moments_of = adapted[name], old.second_moment
            roots[name] = changed._replace(second_moment=_select(accepted, *moments_of))
        roots = self._refresh(buckets, roots, tables, step, accepted)
        return {bucket.name: (roots[bucket.name], gathered[bucket.name]) for bucket in buckets}

    def _refresh(
        self,
        buckets: Sequence[Bucket],
        roots: dict[str, PreconditionerState],
        tables: dict[str, _Tables],
        step: jax.Array,
        accepted: jax.Array,
    ) -> dict[str, PreconditionerState]:
        """Refresh the blocks due in this step: a share of them, or all or none under the periodic schedule."""
        if self.options.refresh == "host":
            return roots
        first, count = schedule.due_phases(step, self.options)
        count = jnp.where(accepted, count, 0)

        def renew(phase: Any, written: dict[str, PreconditionerState]) -> dict[str, PreconditionerState]:
            due, whole = {}, {}
            for bucket in buckets:
                slot = tables[bucket.name].due[0, lax.rem(phase, jnp.int32(bucket.phases))]
                due[bucket.name] = Due(slot, tables[bucket.name].sizes.at[slot].get(mode="clip"))
                old = roots[bucket.name]
                whole[bucket.name] = written[bucket.name]._replace(statistics=old.statistics, scale_log2=old.scale_log2)
            return without(refresh(whole, due, buckets, self.options, step=step, accepted=accepted))

        def without(roots: dict[str, PreconditionerState]) -> dict[str, Any]:
            # A loop or a branch would copy the statistics, which a refresh only reads.
            return {name: old._replace(statistics=(), scale_log2=None) for name, old in roots.items()}

        written = without(roots)
        if self.options.refresh == "periodic":
            crosses = accepted & (-first % self.options.interval < count)
            written = lax.cond(crosses, lambda written: renew(jnp.int32(0), written), lambda written: written, written)
        elif self.options.early_intervals or self.options.start_step:
            # Operands are not negative, so `lax.rem` is correct; it compiles to less code than `%`.
            interval = jnp.int32(self.options.interval)
            written = lax.fori_loop(0, count, lambda i, written: renew(lax.rem(first + i, interval), written), written)
        else:
            written = renew(first, written)
        return {
            name: new._replace(statistics=roots[name].statistics, scale_log2=roots[name].scale_log2)
            for name, new in written.items()
        }


def _acts(state: PreconditionerState, bucket: Bucket, options: Options, step: jax.Array) -> jax.Array:
    """Return [n] bool, whether each block uses its preconditioner instead of the graft method."""
    always = jnp.ones_like(state.refreshed, dtype=bool)
    if not bucket.preconditioner.grafts:
        return always
    sound = (state.refreshed > 0) & (state.failures < options.max_failures) if bucket.sides else always
    return sound & (step >= options.start_step)


def _select(accepted: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, old)


def _squares(x: jax.Array) -> jax.Array:
    return inner(x, x)


def _unit(x: jax.Array) -> jax.Array:
    """Return x / |x|; the squares are taken in units of the largest entry."""
    x = x * power_of_two(-exponent_of(largest(x)))
    return x * _reciprocal(jnp.sqrt(jnp.sum(x * x)))


def _reciprocal(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


def distributed_shampoo(
    learning_rate: float | optax.Schedule,
    options: Options | None = None,
    *,
    mesh: Mesh | None = None,
    axis_names: Any = None,
    param_specs: Any = None,
) -> DistributedShampoo:
    """Return Distributed Shampoo.

    Args:
      learning_rate: a float, or a schedule over the number of accepted steps.
      options: see ShampooOptions; None for the defaults.
      mesh: mesh whose devices own the blocks, independent of the parameters' shardings; None for one device.
      axis_names: tree with a tuple of axis names (or None) per parameter, or None. Names define stacks of matrices
        (scanned layers, experts) and folded sides (heads x head_dim).
      param_specs: tree with a PartitionSpec or NamedSharding per parameter, or None if they are replicated. It saves
        traffic: shards are sent directly to the owners of their blocks. The result does not depend on it.

    Returns:
      An optax gradient transformation with `state_shardings(params)`, `treatments(params)` and `diagnostics(state)`.
    """
    options = options or ShampooOptions()
    return DistributedShampoo(learning_rate, options, mesh, axis_names, param_specs)
