"""Distributed Shampoo as an optax gradient transformation, on one device or with blocks owned by all devices of a mesh.

This is the engine. What acts on a block, and what it is made of, is one of the family in the package `preconditioners`.
For Shampoo itself, after Anil, Gupta, Koren, Regan and Singer, "Scalable Second Order Optimization for Deep Learning"
(arXiv 2002.09018), for a block G (r x c) of a matrix parameter, per step:

    M <- beta1 M + (1 - beta1) G                               momentum
    U = L^(-1/p) M R^(-1/p), scaled to the graft's norm         with the roots of an earlier step
    L <- beta2 L + (1 - beta2) G G',  R likewise with G' G      statistics
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
from .kept import Roots, blocks_of, grafted, preconditioner_of, usable
from .options import Options
from .plan import patterns
from .plan.blocks import Bucket, Plan, make_plan
from .refresh import schedule
from .refresh.refresh import Due, accumulate, refresh
from .state import BucketState, Layout, ShampooState
from .update import decay, moments, norms
from .update.finite import all_finite, largest


class _Tables(NamedTuple):
    """Static facts about a bucket, shared out over the owners; axis 0 numbers the slots or the devices."""

    routes: Any
    matrix: jax.Array
    elements: jax.Array
    sizes: jax.Array
    due: jax.Array


@dataclasses.dataclass(frozen=True)
class ShampooOptions(Options):
    """Options of Distributed Shampoo, as a config names them; the fields and their defaults are those of `Options`."""

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
    """What `distributed_shampoo` returns: optax's (init, update), and what a trainer wants to know.

    Args:
      learning_rate: a float or a schedule over the number of steps taken.
      options: see ShampooOptions.
      mesh: the devices that own the blocks.
      axis_names: tree like the parameters with a tuple of axis names for each.
      param_specs: tree like the parameters with the PartitionSpec of each.
    """

    learning_rate: float | optax.Schedule
    options: Options
    owners: Owners
    axis_names: Any
    param_specs: Any
    _plans: dict[Any, Plan]
    _parcels: dict[int, Parcels]

    def __new__(cls, learning_rate, options: Options, mesh: Mesh | None, axis_names: Any, param_specs: Any):
        """A NamedTuple, as optax has it, with attributes beside its two functions."""
        self = super().__new__(  # type: ignore
            cls,
            lambda params: self._layout(params).initial(params),
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
        """The static plan for a tree of arrays or ShapeDtypeStructs."""
        key = tuple(
            (path, leaf.shape) for path, leaf in zip(patterns.paths(params), jax.tree.leaves(params), strict=True)
        )
        if key not in self._plans:
            specs = self.param_specs if self.owners.mesh is not None else None
            self._plans[key] = make_plan(params, self.axis_names, specs, self.options, self.owners.sizes)
        return self._plans[key]

    def treatments(self, params: Any) -> dict[str, str]:
        """Path -> treatment, for a table."""
        return self.plan(params).treatments

    def state_shardings(self, params: Any) -> ShampooState:
        """A tree of shardings shaped like the state.

        Args:
          params: arrays, or ShapeDtypeStructs with shardings; a diagonal state follows its parameter, spread over the
            mesh axes that the parameter does not use, and one number for each row lies where its row does.
        """
        return self._layout(params).shardings(params)

    def saved_spec(self, params: Any) -> ShampooState:
        """The state as a checkpoint holds it, what is in flight included: ShapeDtypeStructs with shardings."""
        return self._layout(params).saved_spec(params)

    def manifest(self, params: Any) -> dict[str, Any]:
        """Which blocks of which parameters lie where in the state, as JSON; to be kept beside what is saved of it."""
        return describe(self.plan(params), self.options)

    def inheritance(
        self,
        params: Any,
        manifest: Any,
        shapes: Mapping[str, tuple[int, ...]],
        renamed: Callable[[str], str] = lambda path: path,
    ) -> Inheritance:
        """Where each array of the state comes from when a saved one is taken over; see the module `inheritance`."""
        return Inheritance(self.plan(params), self.options, manifest, shapes, renamed)

    def diagnostics(self, state: ShampooState) -> dict[str, jax.Array]:
        """Scalars about the state, by name; see the module `diagnostics`."""
        return diagnose(state, self.options)

    def host_roots(self, params: Any, events: list[Event] | None = None) -> HostRoots | None:
        """The service that computes roots on the host, to be called around every step; see the module `host`.

        None where the refresh schedule is another.

        Args:
          params: arrays or ShapeDtypeStructs.
          events: a list that the service is to note a timeline in.
        """
        if self.options.refresh != "host":
            return None
        plan = self.plan(params)
        if id(plan) not in self._parcels:
            self._parcels[id(plan)] = Parcels(plan.buckets, self.owners, self.options)
        return HostRoots(self._parcels[id(plan)], self.options, events)

    def _layout(self, params: Any) -> Layout:
        return Layout(self.plan(params), self.owners, self.options)

    def _update(self, grads: Any, state: Any, params: Any = None) -> tuple[Any, ShampooState]:
        options, owners = self.options, self.owners
        if options.weight_decay and params is None:
            raise ValueError("weight decay needs the parameters: call update(grads, state, params)")
        plan = self.plan(grads)
        leaves, names = jax.tree.leaves(grads), patterns.paths(grads)
        coupled = options.decay == "coupled"
        gradients = decay.joined(leaves, params, names, options, self.learning_rate) if coupled else leaves
        # Squares may overflow where gradients do not.
        length = largest(gradients)
        finite = jnp.isfinite(length * length)
        exponent = jnp.frexp(jnp.where(finite, length, 0))[1]
        # LAPACK may not return from a NaN, not even in a step that is thrown away.
        gradients = [jnp.where(finite, leaf, 0) for leaf in gradients]
        step = state.count + 1
        directions: list[jax.Array] = [jnp.zeros(())] * len(leaves)

        diagonal = {}
        for i, leaf in plan.diagonal.items():
            key, g = patterns.state_key(leaf.path), gradients[i].astype(jnp.float32)
            if leaf.by_row:
                diagonal[key], directions[i] = moments.advance_rows(state.diagonal[key], g, options.epsilon)
                continue
            if options.normalizes:
                g = _times_power(g, -exponent)
                g = g * _reciprocal(jnp.sqrt(jnp.sum(g * g)))
            diagonal[key], _, directions[i] = moments.advance(state.diagonal[key], g, step, leaf.beta2, options)

        # What an overflow would leave behind in the state could never recover.
        finite &= all_finite([directions[i] for i in plan.diagonal])
        tiles = {b.name: [owners.cut(gradients[leaf.index], leaf) for leaf in b.leaves] for b in plan.buckets}
        specs = {b.name: owners.specs(b) for b in plan.buckets}
        tables = {b.name: self._tables(b) for b in plan.buckets}
        tiles, buckets, overflows = owners.run(
            lambda tiles, owned, shared: self._owners_step(plan.buckets, tiles, *owned, *shared),
            tiles,
            specs,
            (state.buckets, tables),
            (step, exponent),
        )
        for bucket in plan.buckets:
            for leaf, x in zip(bucket.leaves, tiles[bucket.name], strict=True):
                directions[leaf.index] = owners.join(x, leaf)

        finite &= overflows == 0
        rate = jnp.asarray(self.learning_rate(state.count) if callable(self.learning_rate) else self.learning_rate)
        if not coupled:
            directions = decay.joined(directions, params, names, options, self.learning_rate)
        updates = [
            jnp.where(finite, -rate * patterns.first_match(options.rate_rules, name) * direction, 0).astype(leaf.dtype)
            for direction, leaf, name in zip(directions, leaves, names, strict=True)
        ]
        accepted = ShampooState(step, state.skipped, buckets, diagonal)
        refused = state._replace(skipped=state.skipped + 1)
        new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), accepted, refused)
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
        exponent: jax.Array,
    ) -> tuple[Any, Any, Any]:
        """On each device: gradients arrive, directions leave, statistics and due roots are renewed.

        Norms are taken in units of powers of two, found from `exponent`, that of the largest gradient entry. Returns
        also the number of overflows.
        """
        options, owners = self.options, self.owners
        gradients = {b.name: owners.to_owners(tiles[b.name], tables[b.name].routes, b) for b in buckets}
        scaled = self._normalized(gradients, tables, buckets, exponent) if options.normalizes else gradients
        of_graft = exponent if options.graft != "none" and options.diagonal.follows_scale else 0
        new_moments, directions, adapted, grafts, acting, squares = {}, {}, {}, {}, {}, {}
        # Powers of two: what the momentum is multiplied by before it is acted on, and what directions are divided by.
        lifted, of_direction = {}, {}
        for bucket in buckets:
            name, state, preconditioner = bucket.name, states[bucket.name], preconditioner_of(bucket)
            # Roots are those of gradients as they are.
            lifted[name] = exponent if options.normalizes and preconditioner.grafts else 0
            taken = preconditioner.takes(exponent, bucket.group)
            of_direction[name] = exponent - taken if grafted(bucket, options) else 0
            new_moments[name], momentum, grafts[name] = moments.advance(
                state.moments, scaled[name], step, bucket.group.beta2, options
            )
            blocks = blocks_of(state.roots, bucket, tables[name].sizes)
            momentum = _times_power(momentum, lifted[name])
            direction, adapted[name] = preconditioner.act(momentum, scaled[name], blocks, step, options)
            directions[name] = _times_power(direction, -of_direction[name])
            grafts[name] = _times_power(grafts[name], -of_graft)
            acting[name] = usable(state.roots, bucket, options, step)
            own, wanted = _squares(directions[name]), _squares(grafts[name])
            squares[name] = norms.Squares(
                own=jnp.where(acting[name], own, 0),
                wanted=jnp.where(acting[name], wanted if grafted(bucket, options) else own, 0),
                rest=jnp.where(acting[name], 0, wanted),
            )
        elements = {name: table.elements for name, table in tables.items()}
        matrices = {name: table.matrix for name, table in tables.items()}
        by_roots, by_graft = norms.factors(squares, elements, matrices, buckets, owners, options, of_graft)

        overflows = jnp.zeros((), jnp.int32)
        for bucket in buckets:
            name, ones = bucket.name, [1] * len(bucket.shape)
            direction = jnp.where(
                acting[name].reshape(-1, *ones),
                directions[name] * by_roots[name].reshape(-1, *ones),
                grafts[name] * by_graft[name].reshape(-1, *ones),
            )
            directions[name] = _times_power(direction, of_graft if grafted(bucket, options) else 0)
            overflows += ~jnp.isfinite(directions[name].sum())
            if adapted[name] is not None:
                overflows += ~jnp.isfinite(adapted[name].sum())
        overflows = owners.sum(overflows)
        states = {
            name: state._replace(roots=state.roots._replace(second_moment=adapted[name]))
            for name, state in states.items()
        }
        roots = self._renew(buckets, states, gradients, tables, step)
        new_states = {}
        for bucket in buckets:
            name, state = bucket.name, states[bucket.name]
            new_roots, gathered = roots[name]
            new_states[name] = BucketState(
                block=state.block,
                moments=new_moments[name],
                roots=new_roots,
                gathered=gathered,
                graft_ratio=_times_power(
                    jnp.where(acting[name], by_roots[name], 0), of_graft - of_direction[name] + lifted[name]
                ),
            )
        tiles = {b.name: owners.from_owners(directions[b.name], tables[b.name].routes, b) for b in buckets}
        return tiles, new_states, overflows

    def _normalized(
        self,
        gradients: dict[str, jax.Array],
        tables: dict[str, _Tables],
        buckets: Sequence[Bucket],
        exponent: jax.Array,
    ) -> dict[str, jax.Array]:
        """Gradients divided by their norm over the matrix or the block."""
        gradients = {name: _times_power(g, -exponent) for name, g in gradients.items()}
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
    ) -> dict[str, tuple[Roots, jax.Array | None]]:
        """Bucket name -> (statistics and roots after this step, gradients gathered for the next statistics)."""
        every = self.options.statistics_every
        roots, gathered = {}, {}
        for bucket in buckets:
            name, state, sizes = bucket.name, states[bucket.name], tables[bucket.name].sizes
            renewed = functools.partial(accumulate, bucket=bucket, sizes=sizes)
            if state.gathered is None:
                roots[name] = renewed(state.roots, gradients[name])
                gathered[name] = None
                continue
            total, due = state.gathered + gradients[name], step % every == 0
            gathered[name] = jnp.where(due, 0, total)
            roots[name] = lax.cond(due, renewed, lambda old, _: old, state.roots, total / every)
        roots = self._refresh(buckets, roots, tables, step)
        return {bucket.name: (roots[bucket.name], gathered[bucket.name]) for bucket in buckets}

    def _refresh(
        self, buckets: Sequence[Bucket], roots: dict[str, Roots], tables: dict[str, _Tables], step: jax.Array
    ) -> dict[str, Roots]:
        """Refresh what is due on this step: a share of the blocks, or with a periodic schedule all or none."""
        if self.options.refresh == "host":
            return roots
        first, count = schedule.due_phases(step, self.options)

        def renew(phase: Any, written: dict[str, Roots]) -> dict[str, Roots]:
            due, whole = {}, {}
            for bucket in buckets:
                slot = tables[bucket.name].due[0, phase % bucket.phases]
                due[bucket.name] = Due(slot, tables[bucket.name].sizes.at[slot].get(mode="clip"))
                whole[bucket.name] = written[bucket.name]._replace(statistics=roots[bucket.name].statistics)
            return without(refresh(whole, due, buckets, self.options, step=step))

        def without(roots: dict[str, Roots]) -> dict[str, Roots]:
            """What a refresh writes: in a loop or a branch, statistics would be handed on."""
            return {name: old._replace(statistics=()) for name, old in roots.items()}

        written = without(roots)
        if self.options.refresh == "periodic":
            crosses = -first % self.options.interval < count
            written = lax.cond(crosses, lambda written: renew(0, written), lambda written: written, written)
        elif self.options.early_intervals or self.options.start_step:
            interval = self.options.interval
            written = lax.fori_loop(0, count, lambda i, written: renew((first + i) % interval, written), written)
        else:
            written = renew(first, written)
        return {name: new._replace(statistics=roots[name].statistics) for name, new in written.items()}


def _squares(x: jax.Array) -> jax.Array:
    return jnp.sum(x * x, axis=tuple(range(1, x.ndim)))


def _times_power(x: jax.Array, exponent: jax.Array | int) -> jax.Array:
    """The product with 2^exponent, exact as far as float32 can hold the power."""
    return x * jnp.ldexp(jnp.float32(1), jnp.clip(exponent, -126, 127))


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
    """Distributed Shampoo.

    Args:
      learning_rate: a float, or a schedule over the number of steps taken.
      options: see ShampooOptions; None takes the measured defaults.
      mesh: the devices over which blocks are partitioned, whatever the sharding of the parameters; None for one device.
      axis_names: None, or a tree like the parameters with a tuple of axis names (or None) for each; names tell stacks
        of matrices (scanned layers, experts) and folded sides (heads x head_dim).
      param_specs: None (parameters are replicated), or a tree like the parameters of the PartitionSpec or NamedSharding
        that each has on the mesh. The result does not depend on it; the traffic does: with it, blocks travel from the
        shards they lie in straight to their owners.

    Returns:
      An optax gradient transformation with `state_shardings(params)`, `treatments(params)` and `diagnostics(state)`.
    """
    options = options or ShampooOptions()
    return DistributedShampoo(learning_rate, options, mesh, axis_names, param_specs)
