"""Update statistics, solve for the factors of due blocks, and install accepted factors."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..linalg.roots import RootResult
from ..linalg.scaling import exponent_of, power_of_two
from ..linalg.symmetric import pack, unpack
from ..options import Options
from ..plan.blocks import Bucket
from ..preconditioners.base import NO_GRADIENT, PreconditionerState
from ..update.moments import correction

_TILE = 128


class Due(NamedTuple):
    """The blocks of one bucket that a device refreshes in a step.

    Attributes:
      slot: [window] int32, slots of the device; number of slots as padding.
      sizes: [window, sides of a block] int32, side lengths without padding.
    """

    slot: Any
    sizes: Any


def accumulate(state: PreconditionerState, g: jax.Array, bucket: Bucket, sizes: jax.Array) -> PreconditionerState:
    """Update the statistics: L <- beta2 L + (1 - beta2) G G' with G unfolded along each side, or a sum if beta2 is 1.

    Args:
      state: state of a device's blocks.
      g: [n, *shape] float32, gradients.
      bucket: bucket of the blocks.
      sizes: [n, sides of a block] int32, side lengths without padding.
    """
    beta2, preconditioner = bucket.treatment.beta2, bucket.preconditioner
    old, new = (1.0, 1.0) if beta2 == 1 else (beta2, 1 - beta2)
    largest = jnp.max(jnp.abs(g), axis=tuple(range(1, g.ndim)))
    scale_log2 = jnp.maximum(state.scale_log2, jnp.where(largest > 0, exponent_of(largest), NO_GRADIENT))
    change = preconditioner.power(len(bucket.sides)) * (state.scale_log2 - scale_log2)
    change = jnp.where(change > -126, power_of_two(change), 0)[:, None, None]
    g = g * jnp.where(largest > 0, power_of_two(-scale_log2), 0).reshape(-1, *[1] * (g.ndim - 1))
    state, statistics = state._replace(scale_log2=scale_log2), []
    for kept, side in zip(state.statistics, bucket.sides, strict=True):
        x = preconditioner.observed(g, state, bucket, sizes, side)
        others = [axis for axis in range(1, x.ndim) if axis != side + 1]
        product = lax.dot_general(x, x, ((others, others), ((0,), (0,))), precision=lax.Precision.HIGHEST)
        statistics.append(old * change * kept + new * pack(product))
    return state._replace(statistics=tuple(statistics))


def refresh(
    states: dict[str, PreconditionerState],
    due: dict[str, Due],
    buckets: Sequence[Bucket],
    options: Options,
    *,
    step: jax.Array,
    accepted: jax.Array | bool = True,
) -> dict[str, PreconditionerState]:
    """Solve for the due blocks of one device and install accepted factors.

    Matrices with the same side length, preconditioner, root order and regulariser are solved in one batch, across
    buckets. A batch with no due block is skipped. If the factors of any side are rejected, the block keeps its old
    factors and its failure count grows.

    Args:
      states: bucket name -> state of the device's blocks.
      due: bucket name -> due blocks.
      buckets: buckets of the plan.
      options: options of the optimizer.
      step: int32, number of steps in the statistics.
      accepted: bool, whether the step is accepted; otherwise nothing changes.
    """
    updates = step // options.statistics_every

    def rows(x: jax.Array, bucket: Bucket) -> jax.Array:
        return x.at[due[bucket.name].slot].get(mode="clip")

    def statistics(bucket: Bucket, number: int) -> jax.Array:
        packed = rows(states[bucket.name].statistics[number], bucket)
        return unpack(packed / correction(bucket.treatment.beta2, updates, options), bucket.shape[bucket.sides[number]])

    found: dict[tuple[str, int], RootResult] = {}
    before = None
    for length, members in _batches(buckets, options):
        bucket = members[0][0]
        preconditioner = bucket.preconditioner
        wanted = jnp.concatenate([due[b.name].slot < len(states[b.name].residual) for b, _ in members])
        stack = jnp.concatenate([_padded(statistics(b, number), length) for b, number in members])
        stack = jnp.where(wanted[:, None, None], stack, 0)
        sizes = jnp.concatenate([due[b.name].sizes[:, b.sides[number]] for b, number in members])
        old = None
        if preconditioner.warm:
            old = jnp.concatenate([rows(states[b.name].roots[n], b).astype(jnp.float32) for b, n in members])
        if before is not None and preconditioner.uses_lapack(options):
            # Two concurrent LAPACK calls can deadlock a CPU, so each waits for the one before it.
            stack, before = lax.optimization_barrier((stack, before))
        batch = lax.cond(
            jnp.any(wanted),
            lambda stack, old, sizes, bucket=bucket: bucket.preconditioner.solve(stack, old, sizes, bucket, options),
            lambda stack, old, sizes: _unsolved(stack),
            stack,
            old,
            sizes,
        )
        before, first = batch.residual, 0
        for b, number in members:
            part = slice(first, first + due[b.name].slot.shape[0])
            own, side = jax.tree.map(lambda x, part=part: x[part], batch), b.shape[b.sides[number]]
            found[b.name, number] = own._replace(root=own.root[:, :side, :side])
            first = part.stop

    result = dict(states)
    for bucket in buckets:
        if bucket.sides:
            sides = _joined([found[bucket.name, number] for number in range(len(bucket.sides))])
            slot = jnp.where(accepted, due[bucket.name].slot, len(states[bucket.name].residual))
            scale_log2 = rows(states[bucket.name].scale_log2, bucket)
            result[bucket.name] = install(states[bucket.name], slot, sides, scale_log2, step, bucket)
    return result


def install(
    state: PreconditionerState,
    slot: jax.Array,
    new: RootResult,
    scale_log2: jax.Array,
    step: jax.Array,
    bucket: Bucket,
) -> PreconditionerState:
    """Write accepted factors to their slots.

    Args:
      state: state of a device's blocks.
      slot: [m] int32, slots of the blocks in `new`; number of slots for blocks to ignore.
      new: result of a refresh, with a tuple of roots, one per preconditioned side.
      scale_log2: [m] int32, binary scale of the solved statistics.
      step: int32, number of steps in the statistics.
      bucket: bucket of the blocks.
    """
    hits = slot == jnp.arange(len(state.residual))[:, None]
    one = len(slot) == 1
    here, row = (hits[:, 0], slice(None)) if one else (jnp.any(hits, axis=1), jnp.argmax(hits, axis=1))
    accepted, seen = new.accepted[row], new.largest[row] > 0

    def put(x: jax.Array, found: jax.Array) -> jax.Array:
        if one:  # a select compiles to less than a scatter
            return jnp.where((here & accepted).reshape(-1, *([1] * (x.ndim - 1))), found.astype(x.dtype), x)
        # A select would first spread what is found over all slots.
        return x.at[jnp.where(new.accepted, slot, len(x))].set(found.astype(x.dtype), mode="drop")

    def add(x: jax.Array, changed: jax.Array) -> jax.Array:
        return x + changed.astype(x.dtype)

    second_moment = state.second_moment
    if second_moment is not None:
        old = [x.at[slot].get(mode="clip").astype(jnp.float32) for x in state.roots]
        moment = second_moment.at[slot].get(mode="clip")
        second_moment = put(second_moment, bucket.preconditioner.carried(moment, old, new.root, bucket.sides))
    failures = add(state.failures, here & ~accepted & seen)
    return state._replace(
        second_moment=second_moment,
        roots=tuple(put(x, root) for x, root in zip(state.roots, new.root, strict=True)),
        roots_scale_log2=put(state.roots_scale_log2, scale_log2),
        residual=put(state.residual, new.residual),
        condition=put(state.condition, new.condition),
        effective_rank=put(state.effective_rank, new.effective_rank),
        refreshed=jnp.where(here & accepted, step, state.refreshed),
        failures=jnp.where(here & accepted, 0, failures),
        refreshes=add(state.refreshes, here & accepted),
    )


def _batches(buckets: Sequence[Bucket], options: Options) -> list[tuple[int, list[tuple[Bucket, int]]]]:
    """Return (side length, [(bucket, index into its preconditioned sides)]) of each batch.

    All sides up to _TILE share a batch: an accelerator pads them to a tile anyway, and each length compiles a solver.
    """
    batches: dict[Any, list[tuple[Bucket, int]]] = {}
    for bucket in buckets:
        treatment = bucket.treatment
        for number, side in enumerate(bucket.sides):
            length = bucket.shape[side]
            joins = length <= _TILE and not bucket.preconditioner.uses_lapack(options)
            kind = (bucket.preconditioner.name, bucket.p, treatment.ridge, treatment.cut)
            batches.setdefault((*kind, 0 if joins else length), []).append((bucket, number))
    return [(max(b.shape[b.sides[number]] for b, number in members), members) for members in batches.values()]


def _padded(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), *[(0, length - x.shape[-1])] * 2])


def _unsolved(stack_nrr: jax.Array) -> RootResult:
    nothing = jnp.zeros(len(stack_nrr), jnp.float32)
    return RootResult(stack_nrr, nothing, nothing, nothing, nothing, nothing > 0)


def _joined(sides: Sequence[RootResult]) -> RootResult:
    """Join the results of all sides: the worst number of each block, accepted if all sides are accepted."""
    root, residual, largest, condition, rank, accepted = zip(*sides, strict=True)
    return RootResult(
        root=root,
        residual=functools.reduce(jnp.maximum, residual),
        largest=functools.reduce(jnp.minimum, largest),
        condition=functools.reduce(jnp.maximum, condition),
        effective_rank=functools.reduce(jnp.minimum, rank),
        accepted=functools.reduce(jnp.logical_and, accepted),
    )
