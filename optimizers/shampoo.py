"""Distributed Shampoo as an optax gradient transformation, on one device or with blocks owned by all devices of a mesh.

After Anil, Gupta, Koren, Regan and Singer, "Scalable Second Order Optimization for Deep Learning" (arXiv 2002.09018).
For a block G (r x c) of a matrix parameter, per step:

    M <- beta1 M + (1 - beta1) G                               momentum
    U = L^(-1/p) M R^(-1/p), scaled to the graft's norm         with the roots of an earlier step
    L <- beta2 L + (1 - beta2) G G',  R likewise with G' G      statistics
    for the blocks that are due: new roots of L and R, used from the next step on
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from . import patterns
from .blocks import Bucket, Plan, from_blocks, make_plan, to_blocks
from .exchange import Owners
from .options import ShampooOptions
from .refresh import NO_GRADIENT, Due, Roots, refresh

# Smaller diagonal states are not worth the latency of spreading them over the devices.
SPREAD_FROM = 2**16


class Moments(NamedTuple):
    """Momentum and second moment, shaped like what they belong to; None where the options keep none."""

    momentum: jax.Array | None
    second_moment: jax.Array | None


class BucketState(NamedTuple):
    """State of a bucket; axis 0 of every array numbers the slots, whose devices own the blocks."""

    moments: Moments
    roots: Roots


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


class DistributedShampoo(optax.GradientTransformation):
    """What `distributed_shampoo` returns: optax's (init, update), and what a trainer wants to know.

    Args:
      learning_rate: a float or a schedule over the number of steps taken.
      options: see ShampooOptions.
      mesh: the devices that own the blocks.
      axis_names: tree like the parameters with a tuple of axis names for each.
    """

    learning_rate: float | optax.Schedule
    options: ShampooOptions
    owners: Owners
    axis_names: Any

    def __new__(cls, learning_rate, options: ShampooOptions, mesh: Mesh | None, axis_names: Any):
        """A NamedTuple, as optax has it, with attributes beside its two functions."""
        self = super().__new__(  # type: ignore
            cls,
            lambda params: self._init(params),
            lambda updates, state, params=None: self._update(updates, state, params),
        )
        self.learning_rate = learning_rate
        self.options = options
        self.owners = Owners(mesh)
        self.axis_names = axis_names
        return self

    def plan(self, params: Any, owners: int | None = None) -> Plan:
        """The static plan for a tree of arrays or ShapeDtypeStructs, for this mesh or another number of owners."""
        return make_plan(params, self.axis_names, self.options, owners or self.owners.count)

    def treatments(self, params: Any) -> dict[str, str]:
        """Path -> treatment, for a table."""
        return self.plan(params).treatments

    def state_shardings(self, params: Any) -> ShampooState:
        """A tree of shardings shaped like the state.

        Args:
          params: arrays, or ShapeDtypeStructs with shardings; a diagonal state follows its parameter, spread over the
            mesh axes that the parameter does not use.
        """
        state = jax.eval_shape(self._init, params)
        mesh = self.owners.mesh
        if mesh is None:
            single = SingleDeviceSharding(jax.devices()[0])
            return jax.tree.map(lambda _: single, state)
        replicated = NamedSharding(mesh, PartitionSpec())
        by_block = self.owners.sharding(self.owners.by_block)
        leaves, names = jax.tree.leaves(params), patterns.paths(params)
        diagonal = {}
        for index in self.plan(params).diagonal:
            leaf = leaves[index]
            own = getattr(leaf, "sharding", None)
            spec = own.spec if isinstance(own, NamedSharding) else PartitionSpec()
            key = _state_key(names[index])
            spread = NamedSharding(mesh, _spread(spec, leaf.shape, mesh))
            diagonal[key] = jax.tree.map(lambda _, spread=spread: spread, state.diagonal[key])
        return ShampooState(
            count=replicated,  # type: ignore
            skipped=replicated,  # type: ignore
            buckets=jax.tree.map(lambda _: by_block, state.buckets),
            diagonal=diagonal,
        )

    def state_of_owners(self, params: Any, owners: int) -> ShampooState:
        """The state as `owners` devices keep it: ShapeDtypeStructs, laid out on this mesh to restore a checkpoint."""
        own = self.state_shardings(params)
        state = jax.eval_shape(lambda params: self._zeros(params, self.plan(params, owners)), params)

        def spec(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
            if leaf.ndim and leaf.shape[0] % self.owners.count and self.owners.mesh is not None:
                sharding = self.owners.sharding(PartitionSpec())
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        buckets = jax.tree.map(spec, state.buckets, own.buckets)
        kept = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state._replace(buckets={}),
            own._replace(buckets={}),
        )
        return kept._replace(buckets=buckets)

    def adopt(self, state: ShampooState, params: Any, owners: int) -> ShampooState:
        """A state kept by `owners` devices, its blocks moved to their owners on this mesh; no value changes."""
        buckets = {}
        for old, new in zip(self.plan(params, owners).buckets, self.plan(params).buckets, strict=True):
            source = np.append(old.slot_of_block, old.slots.size)[new.slots.reshape(-1)]
            buckets[new.name] = jax.tree.map(
                lambda x, source=source: x.at[source].get(mode="fill", fill_value=0), state.buckets[new.name]
            )
        return state._replace(buckets=buckets)

    def diagnostics(self, state: ShampooState) -> dict[str, jax.Array]:
        """Scalars about the state: refreshes in all, and per bucket residual, staleness, failures and fall-backs.

        Staleness is in steps, the mean over blocks that have a root; a fall-back is a block with statistics that uses
        the graft method, because it has no root yet or its refreshes keep failing.
        """
        result = {"refreshes": jnp.zeros((), jnp.int32)}
        for name, bucket in state.buckets.items():
            roots = bucket.roots
            rooted = roots.refreshed > 0
            number = jnp.maximum(jnp.sum(rooted), 1)
            seen = jnp.trace(roots.statistics[0], axis1=-2, axis2=-1) > 0
            result["refreshes"] += jnp.sum(roots.refreshes)
            result[f"{name}/residual"] = jnp.max(jnp.where(rooted, roots.residual, 0))
            result[f"{name}/staleness"] = jnp.sum(jnp.where(rooted, state.count - roots.refreshed, 0)) / number
            result[f"{name}/failures"] = jnp.sum(roots.failures)
            result[f"{name}/fallbacks"] = jnp.sum(seen & ~self._usable(roots))
        return result

    def _usable(self, roots: Roots) -> jax.Array:
        """[n] whether a block acts with its roots rather than with the graft method."""
        return (roots.refreshed > 0) & (roots.failures < self.options.max_failures)

    def _moments(self, shape: tuple[int, ...]) -> Moments:
        options = self.options
        return Moments(
            jnp.zeros(shape, jnp.float32) if options.beta1 else None,
            jnp.zeros(shape, jnp.float32) if options.diagonal.has_second_moment else None,
        )

    def _init(self, params: Any) -> Any:
        state = self._zeros(params, self.plan(params))
        if self.owners.mesh is None:
            return state
        by_block = self.owners.sharding(self.owners.by_block)
        return state._replace(buckets=jax.tree.map(lambda x: lax.with_sharding_constraint(x, by_block), state.buckets))

    def _zeros(self, params: Any, plan: Plan) -> ShampooState:
        leaves, names = jax.tree.leaves(params), patterns.paths(params)

        def bucket_state(bucket: Bucket) -> BucketState:
            n = bucket.slots.size
            sides = (bucket.rows, bucket.cols) if bucket.sides == "both" else (bucket.rows,)
            return BucketState(
                self._moments((n, bucket.rows, bucket.cols)),
                Roots(
                    statistics=tuple(jnp.zeros((n, r, r), jnp.float32) for r in sides),
                    exponent=jnp.full(n, NO_GRADIENT, jnp.int32),
                    roots=tuple(jnp.zeros((n, r, r), jnp.float32) for r in sides),
                    residual=jnp.zeros(n, jnp.float32),
                    refreshed=jnp.zeros(n, jnp.int32),
                    failures=jnp.zeros(n, jnp.int32),
                    refreshes=jnp.zeros(n, jnp.int32),
                ),
            )

        return ShampooState(
            count=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            buckets={bucket.name: bucket_state(bucket) for bucket in plan.buckets},
            diagonal={_state_key(names[i]): self._moments(leaves[i].shape) for i in plan.diagonal},
        )

    def _update(self, grads: Any, state: Any, params: Any = None) -> tuple[Any, ShampooState]:
        options, owners = self.options, self.owners
        if options.weight_decay and params is None:
            raise ValueError("weight decay needs the parameters: call update(grads, state, params)")
        plan = self.plan(grads)
        leaves, names = jax.tree.leaves(grads), patterns.paths(grads)
        finite = _all_finite([jnp.square(leaf.astype(jnp.float32)) for leaf in leaves])
        step = state.count + 1
        directions: list[jax.Array] = [jnp.zeros(())] * len(leaves)

        diagonal = {}
        for i in plan.diagonal:
            key = _state_key(names[i])
            diagonal[key], _, directions[i] = self._moments_step(state.diagonal[key], leaves[i], step)

        sliced = {
            bucket.name: [owners.slice_blocks(to_blocks(leaves[leaf.index], leaf, bucket)) for leaf in bucket.leaves]
            for bucket in plan.buckets
        }
        constants = {
            bucket.name: (
                jnp.asarray(bucket.matrix_of_slot()),
                jnp.asarray(bucket.real_sizes()),
                jnp.asarray(bucket.due),
            )
            for bucket in plan.buckets
        }
        updates, buckets, overflows = owners.run(
            lambda sliced, owned, step: self._owners_step(plan.buckets, sliced, owned[0], owned[1], step),
            sliced,
            (state.buckets, constants),
            step,
        )
        for bucket in plan.buckets:
            for leaf, blocks in zip(bucket.leaves, updates[bucket.name], strict=True):
                elements = bucket.rows * bucket.cols
                directions[leaf.index] = from_blocks(blocks[:, :elements], leaf, bucket)

        # Squares may overflow where gradients do not; what they would leave behind in the state could never recover.
        finite &= (overflows == 0) & _all_finite(directions)
        rate = jnp.asarray(self.learning_rate(state.count) if callable(self.learning_rate) else self.learning_rate)
        if options.weight_decay:
            for i, (name, param) in enumerate(zip(names, jax.tree.leaves(params), strict=True)):
                if patterns.first_match(options.decay_rules, name):
                    directions[i] = directions[i] + options.weight_decay * param
        updates = [
            jnp.where(finite, -rate * direction, 0).astype(leaf.dtype)
            for direction, leaf in zip(directions, leaves, strict=True)
        ]
        accepted = ShampooState(step, state.skipped, buckets, diagonal)
        refused = state._replace(skipped=state.skipped + 1)
        new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), accepted, refused)
        return jax.tree.unflatten(jax.tree.structure(grads), updates), new_state

    def _moments_step(self, moments: Moments, g: jax.Array, step: jax.Array) -> tuple[Moments, jax.Array, jax.Array]:
        """New moments, the momentum to act on and the diagonal method's direction, for an array of any shape."""
        options = self.options
        g = g.astype(jnp.float32)
        momentum, acting = moments.momentum, g
        if momentum is not None:
            momentum = options.beta1 * momentum + (1 - options.beta1) * g
            acting = options.beta1 * momentum + (1 - options.beta1) * g if options.nesterov else momentum
            acting = acting / (1 - options.beta1 ** step.astype(jnp.float32))
        second_moment = moments.second_moment
        if second_moment is not None:
            second_moment = options.diagonal.accumulate(second_moment, g, options.beta2)
        direction = options.diagonal.direction(acting, second_moment, self._correction(step), options.epsilon)
        return Moments(momentum, second_moment), acting, direction

    def _correction(self, step: jax.Array) -> jax.Array:
        """Divisor that makes an average of second moments unbiased; 1 for sums."""
        beta2 = self.options.beta2
        return jnp.float32(1) if beta2 == 1 else 1 - beta2 ** step.astype(jnp.float32)

    def _owners_step(
        self, buckets: Sequence[Bucket], sliced: Any, states: dict[str, BucketState], constants: Any, step: jax.Array
    ) -> tuple[Any, Any, Any]:
        """On each device: gradients arrive, directions leave, statistics and due roots are renewed."""
        options, owners = self.options, self.owners
        gradients, moments, directions, grafts, acting = {}, {}, {}, {}, {}
        for bucket in buckets:
            g_nrc = owners.to_owners(sliced[bucket.name], bucket)
            state = states[bucket.name]
            new_moments, m_nrc, graft_nrc = self._moments_step(state.moments, g_nrc, step)
            direction_nrc = self._precondition(m_nrc, state.roots, bucket)
            usable = self._usable(state.roots)
            gradients[bucket.name], moments[bucket.name], grafts[bucket.name] = g_nrc, new_moments, graft_nrc
            directions[bucket.name], acting[bucket.name] = (
                jnp.where(usable[:, None, None], direction_nrc, graft_nrc),
                usable,
            )

        if options.graft != "none":
            directions = self._graft(buckets, directions, grafts, acting, constants)

        roots = {bucket.name: self._accumulate(states[bucket.name].roots, gradients[bucket.name]) for bucket in buckets}
        roots = self._refresh(buckets, roots, constants, step)
        new_states = {bucket.name: BucketState(moments[bucket.name], roots[bucket.name]) for bucket in buckets}
        overflows = jnp.zeros((), jnp.int32)
        for bucket in buckets:
            traces = [jnp.trace(s, axis1=-2, axis2=-1).sum() for s in roots[bucket.name].statistics]
            overflows += sum(~jnp.isfinite(x) for x in (*traces, directions[bucket.name].sum()))
        updates = {bucket.name: owners.from_owners(directions[bucket.name], bucket) for bucket in buckets}
        return updates, new_states, owners.sum(overflows)

    def _precondition(self, m_nrc: jax.Array, roots: Roots, bucket: Bucket) -> jax.Array:
        """L^(-1/p) M R^(-1/p), batched over the blocks."""
        direction = jnp.einsum("nij,njk->nik", roots.roots[0], m_nrc, precision=lax.Precision.HIGHEST)
        if bucket.sides == "both":
            direction = jnp.einsum("nij,njk->nik", direction, roots.roots[1], precision=lax.Precision.HIGHEST)
        return direction

    def _accumulate(self, roots: Roots, g_nrc: jax.Array) -> Roots:
        """L <- beta2 L + (1 - beta2) G G', R likewise; sums where beta2 is 1; all of G / 2^exponent."""
        beta2 = self.options.beta2
        old, new = (1.0, 1.0) if beta2 == 1 else (beta2, 1 - beta2)
        largest = jnp.max(jnp.abs(g_nrc), axis=(1, 2))
        exponent = jnp.maximum(roots.exponent, jnp.where(largest > 0, jnp.frexp(largest)[1], NO_GRADIENT))
        one = jnp.float32(1)  # ldexp: a power of two to the last bit, which exp2 need not be
        grown = jnp.ldexp(one, jnp.maximum(2 * (roots.exponent - exponent), -300))[:, None, None]
        g_nrc = g_nrc * jnp.ldexp(one, -exponent)[:, None, None]
        g_nrc = jnp.where(largest[:, None, None] > 0, g_nrc, 0)
        products = ("nik,njk->nij", "nki,nkj->nij")
        statistics = tuple(
            old * grown * s_nrr + new * jnp.einsum(product, g_nrc, g_nrc, precision=lax.Precision.HIGHEST)
            for s_nrr, product in zip(roots.statistics, products, strict=False)
        )
        return roots._replace(statistics=statistics, exponent=exponent)

    def _refresh(
        self, buckets: Sequence[Bucket], roots: dict[str, Roots], constants: Any, step: jax.Array
    ) -> dict[str, Roots]:
        """Refresh what is due on this step: a share of the blocks, or with a periodic schedule all or none."""
        due = {}
        for bucket in buckets:
            _, sizes_n2, due_1kw = constants[bucket.name]
            slot = due_1kw[0, (step - 1) % bucket.phases]
            due[bucket.name] = Due(slot, sizes_n2.at[slot].get(mode="clip"))

        def renew(roots: dict[str, Roots]) -> dict[str, Roots]:
            return refresh(roots, due, buckets, self.options, correction=self._correction(step), step=step)

        if self.options.refresh == "staggered":
            return renew(roots)
        return lax.cond((step - 1) % self.options.interval == 0, renew, lambda roots: roots, roots)

    def _graft(
        self,
        buckets: Sequence[Bucket],
        directions: dict[str, Any],
        grafts: dict[str, Any],
        acting: dict[str, Any],
        constants: Any,
    ) -> dict[str, Any]:
        """Give the directions of each matrix (or block) the norm of the graft's; one sum over the devices.

        Only blocks acting with their roots take part: the others have the graft's direction, which stays as it is.
        """
        own, wanted = {}, {}
        for bucket in buckets:
            for squares, of in ((own, directions), (wanted, grafts)):
                squares[bucket.name] = jnp.where(acting[bucket.name], jnp.sum(of[bucket.name] ** 2, axis=(1, 2)), 0)
        if self.options.graft_norm == "parameter":
            members = {
                bucket.name: constants[bucket.name][0][:, None] == jnp.arange(bucket.matrices) for bucket in buckets
            }
            by_matrix = {
                name: jnp.stack(
                    [jnp.sum(jnp.where(members[name], squares[name][:, None], 0), axis=0) for squares in (own, wanted)]
                )
                for name in members
            }
            joined = jnp.concatenate(list(by_matrix.values()), axis=1) if by_matrix else jnp.zeros((2, 0))
            joined, first = self.owners.sum(joined), 0
            for bucket in buckets:
                totals = joined[:, first : first + bucket.matrices]
                first += bucket.matrices
                own[bucket.name], wanted[bucket.name] = totals[:, constants[bucket.name][0]]
        result = {}
        for bucket in buckets:
            squares = own[bucket.name]
            ratio = jnp.where(squares > 0, jnp.sqrt(wanted[bucket.name] / jnp.where(squares > 0, squares, 1)), 0)
            ratio = jnp.where(acting[bucket.name], ratio, 1)
            result[bucket.name] = directions[bucket.name] * ratio[:, None, None]
        return result


def _all_finite(leaves: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(operator.and_, [jnp.isfinite(leaf).all() for leaf in leaves], jnp.bool_(True))


def _state_key(path: str) -> str:
    """A path as a key of the state: checkpoints keep slashes for their own nesting."""
    return path.replace("/", ".")


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


def distributed_shampoo(
    learning_rate: float | optax.Schedule,
    options: ShampooOptions | None = None,
    *,
    mesh: Mesh | None = None,
    axis_names: Any = None,
) -> DistributedShampoo:
    """Distributed Shampoo.

    Args:
      learning_rate: a float, or a schedule over the number of steps taken.
      options: see ShampooOptions; None takes the measured defaults.
      mesh: the devices over which blocks are partitioned, whatever the sharding of the parameters; None for one device.
      axis_names: None, or a tree like the parameters with a tuple of axis names (or None) for each; names tell stacks
        of matrices (scanned layers, experts) and folded sides (heads x head_dim).

    Returns:
      An optax gradient transformation with `state_shardings(params)`, `treatments(params)` and `diagnostics(state)`.
    """
    return DistributedShampoo(learning_rate, options or ShampooOptions(), mesh, axis_names)
