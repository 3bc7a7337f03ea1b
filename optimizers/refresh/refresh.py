"""Statistics of gradients, and fresh factors of them for the blocks that are due, accepted only if sound."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import residence, storage
from ..kept import NO_GRADIENT, Roots, blocks_of, factors, kept_factor, preconditioner_of, rows, statistics_of, trace
from ..linalg import sketch
from ..linalg.symmetric import pack
from ..options import ShampooOptions
from ..plan.blocks import Bucket
from ..preconditioners.base import Solved
from ..update.moments import correction
from .tolerance import suited


class Fresh(NamedTuple):
    """What a refresh has found for blocks of one bucket; axis 0 of every array numbers the blocks that were due.

    Attributes:
      roots: per preconditioned side [m, ...] float32, as they are kept, of the gradients as they are.
      residual, condition: [m] float32, of the worst side.
      effective_rank: [m] float32, of the side where it is least.
      accepted: [m] bool, whether the roots of all sides may be used.
      seen: [m] bool, whether the block has seen a gradient that is not zero: otherwise it has nothing to fail at.
      suited: [m] int32, bit k tells that the factor of the k-th preconditioned side stays as it is.
    """

    roots: tuple[jax.Array, ...]
    residual: jax.Array
    condition: jax.Array
    effective_rank: jax.Array
    accepted: jax.Array
    seen: jax.Array
    suited: jax.Array


class Due(NamedTuple):
    """The blocks of one bucket that a device refreshes on this step.

    Attributes:
      slot: [window] int32, the device's slots; one past the last where nothing is due.
      sizes: [window, sides of a block] int32, the blocks' real lengths.
    """

    slot: jax.Array
    sizes: jax.Array


def accumulate(
    roots: Roots,
    g: jax.Array,
    bucket: Bucket,
    sizes: jax.Array,
    *,
    wanted: jax.Array | bool = True,
    on_host: bool = False,
) -> Roots:
    """L <- beta2 L + (1 - beta2) G G' for each preconditioned side, G unfolded along it; sums where beta2 is 1.

    Args:
      roots: a device's blocks.
      g: [n, *shape] float32, their gradients.
      bucket: theirs.
      sizes: [n, sides of a block] int32, their real lengths.
      wanted: scalar; where it is not, all stays as it is.
      on_host: whether the statistics are in host memory.
    """
    beta2, preconditioner = bucket.group.beta2, preconditioner_of(bucket)
    old, new = (1.0, 1.0) if beta2 == 1 else (beta2, 1 - beta2)
    largest = jnp.max(jnp.abs(g), axis=tuple(range(1, g.ndim)))
    exponent = jnp.maximum(roots.exponent, jnp.where((largest > 0) & wanted, jnp.frexp(largest)[1], NO_GRADIENT))
    one = jnp.float32(1)  # ldexp: a power of two to the last bit, which exp2 need not be
    grown = _power(preconditioner.power(len(bucket.sides)) * jnp.maximum(roots.exponent - exponent, -150))
    grown = grown[:, None, None]
    scale = jnp.where(largest > 0, jnp.ldexp(one, -exponent), 0).reshape(-1, *[1] * (g.ndim - 1))
    g = jnp.where(scale > 0, g * scale, 0)
    blocks = blocks_of(roots._replace(exponent=exponent), bucket, sizes)
    blocks = blocks._replace(statistics=lambda: [grown * s for s in blocks_of(roots, bucket, sizes).statistics()])
    statistics = []
    for number, kept in enumerate(roots.statistics):

        def renewed(kept: jax.Array, x: jax.Array, grown: jax.Array, number: int = number) -> jax.Array:
            product = second_moments(x, bucket, number)
            total = old * grown * storage.loaded(kept, product.shape[1:]) + new * product
            return storage.stored(total, kept.dtype, dithered=True)

        x = preconditioner.observed(g, blocks, bucket.sides[number])
        statistics.append(residence.updated(kept, renewed, (x, grown), wanted=wanted, on_host=on_host))
    return roots._replace(statistics=tuple(statistics), exponent=exponent)


def second_moments(x: jax.Array, bucket: Bucket, number: int) -> jax.Array:
    """X X' of blocks x [n, *shape], X unfolded along the k-th preconditioned side, as statistics are kept."""
    side, rank = bucket.sides[number], bucket.group.rank
    if sketch.columns(bucket.shape[side], rank) < bucket.shape[side]:
        return sketch.moments(x, side, rank)
    others = [axis for axis in range(1, x.ndim) if axis != side + 1]
    return pack(lax.dot_general(x, x, ((others, others), ((0,), (0,))), precision=lax.Precision.HIGHEST))


def _power(exponent: jax.Array) -> jax.Array:
    """2^exponent, to the last bit where it is whole."""
    whole = jnp.floor(exponent)
    return jnp.ldexp(jnp.exp2(exponent - whole), whole.astype(jnp.int32))


def refresh(
    roots: dict[str, Roots], due: dict[str, Due], buckets: Sequence[Bucket], options: ShampooOptions, *, step: jax.Array
) -> dict[str, Roots]:
    """New factors for the due blocks of one device.

    Matrices of one side length, preconditioner, root order, regulariser and rank are solved in one batch, whatever
    bucket they come from; a batch with nothing due is not solved. Whether a factor is sound its preconditioner says. A
    block accepts those of all its sides or of none; otherwise it keeps what it has, and its failure count grows.

    Args:
      roots: bucket name -> the device's blocks.
      due: bucket name -> which of them are due.
      buckets: the buckets.
      options: solver and bounds.
      step: count of the steps whose gradients are in the statistics.
    """
    updates = step // options.statistics_every
    batches: dict[Any, list[tuple[Bucket, int]]] = {}
    for bucket in buckets:
        group = bucket.group
        for number, side in enumerate(bucket.sides):
            key = (group.preconditioner, bucket.shape[side], group.p, group.ridge, group.cut, group.rank)
            batches.setdefault(key, []).append((bucket, number))

    on_host = options.statistics_memory == "host"
    due_rows = {
        (b.name, number): statistics_of(residence.rows(statistics, due[b.name].slot, on_host=on_host), b, number)
        / correction(b.group.beta2, updates, options)
        for b in buckets
        for number, statistics in enumerate(roots[b.name].statistics)
    }
    staying = {
        b.name: suited(
            roots[b.name],
            due[b.name].slot,
            [due_rows[b.name, number] for number in range(len(b.sides))],
            due[b.name].sizes,
            b,
            options,
        )
        for b in buckets
        if b.sides
    }
    solved: dict[tuple[str, int], Solved] = {}
    before = None
    for members in batches.values():
        group, preconditioner = members[0][0].group, preconditioner_of(members[0][0])
        wanted = jnp.concatenate(
            [
                (due[b.name].slot < roots[b.name].residual.shape[0]) & (staying[b.name] & 1 << number == 0)
                for b, number in members
            ]
        )
        stack = jnp.concatenate([due_rows[b.name, number] for b, number in members])
        stack = jnp.where(wanted[:, None, None], stack, 0)
        sizes = jnp.concatenate([due[b.name].sizes[:, b.sides[number]] for b, number in members])
        old = None
        if preconditioner.warm:
            old = jnp.concatenate([factors(rows(roots[b.name], due[b.name].slot), b)[number] for b, number in members])
        if before is not None and preconditioner.uses_lapack(group, options):
            # Two LAPACK calls in flight can deadlock on a CPU: the next begins when this one has ended.
            stack, before = lax.optimization_barrier((stack, before))
        batch = lax.cond(
            jnp.any(wanted),
            lambda stack, old, sizes, group=group, preconditioner=preconditioner: preconditioner.solve(
                stack, old, sizes, group, options
            ),
            lambda stack, old, sizes: _unsolved(stack),
            stack,
            old,
            sizes,
        )
        before, first = batch.residual, 0
        for bucket, number in members:
            part = slice(first, first + due[bucket.name].slot.shape[0])
            solved[bucket.name, number] = jax.tree.map(lambda x, part=part: x[part], batch)
            first = part.stop

    result = dict(roots)
    for bucket in buckets:
        if bucket.sides:
            state, slot = roots[bucket.name], due[bucket.name].slot
            numbers = range(len(bucket.sides))
            seen = [trace(due_rows[bucket.name, k]) > 0 for k in numbers]
            sides = [solved[bucket.name, k] for k in numbers]
            exponent = state.exponent.at[slot].get(mode="clip")
            fresh = _joined(sides, jnp.stack(seen).all(axis=0), staying[bucket.name], exponent, bucket)
            result[bucket.name] = install(state, slot, fresh, step, bucket)
    return result


def install(state: Roots, slot: jax.Array, fresh: Fresh, step: jax.Array, bucket: Bucket) -> Roots:
    """Accepted factors take the places of the old ones.

    Args:
      state: a device's blocks.
      slot: [m] int32, where the blocks of `fresh` are; past the last for those that are to be left out.
      fresh: what a refresh has found.
      step: count of the steps whose gradients are in the statistics it was made from.
      bucket: the blocks'.
    """
    staying = [(fresh.suited & 1 << number) > 0 for number in range(len(bucket.sides))]
    new = fresh.accepted & ~functools.reduce(operator.and_, staying)  # that some side has a new factor

    def old(x: jax.Array) -> jax.Array:
        return x.at[slot].get(mode="clip")

    def put(x: jax.Array, new: jax.Array, keep: jax.Array) -> jax.Array:
        new = jnp.where(keep.reshape(-1, *([1] * (x.ndim - 1))), new, old(x))
        return x.at[slot].set(new.astype(x.dtype), mode="drop")

    def worst(of: jax.Array, found: jax.Array, than: Callable[..., jax.Array]) -> jax.Array:
        """The number of a block some of whose sides stay: of those only the block's worst is known."""
        return put(of, jnp.where(fresh.suited > 0, than(found, old(of)), found), new)

    accepted, second_moment = fresh.accepted, state.second_moment
    if second_moment is not None:
        before, after = (factors(kept, bucket) for kept in (rows(state, slot), fresh.roots))
        after = [jnp.where(stays[:, None, None], b, a) for stays, b, a in zip(staying, before, after, strict=True)]
        carried = preconditioner_of(bucket).carried(old(second_moment), before, after, bucket.sides)
        second_moment = put(second_moment, carried, new)
    return state._replace(
        second_moment=second_moment,
        roots=tuple(
            put(x, storage.stored(root, x.dtype), accepted & ~stays)
            for x, root, stays in zip(state.roots, fresh.roots, staying, strict=True)
        ),
        residual=worst(state.residual, fresh.residual, jnp.maximum),
        condition=worst(state.condition, fresh.condition, jnp.maximum),
        effective_rank=worst(state.effective_rank, fresh.effective_rank, jnp.minimum),
        refreshed=put(state.refreshed, step, accepted),
        failures=put(state.failures, jnp.where(accepted, 0, old(state.failures) + 1), accepted | fresh.seen),
        refreshes=put(state.refreshes, old(state.refreshes) + 1, accepted),
        spared=tuple(put(x, old(x) + 1, accepted & stays) for x, stays in zip(state.spared, staying, strict=True)),
    )


def _unsolved(stack_nrr: jax.Array) -> Solved:
    nothing = jnp.zeros(len(stack_nrr))
    return Solved(stack_nrr, nothing, nothing, nothing, nothing > 0)


def _joined(sides: Sequence[Solved], seen: jax.Array, suited: jax.Array, exponent: jax.Array, bucket: Bucket) -> Fresh:
    """What was solved side by side, as one answer for each block."""
    # Of the gradients as they are.
    scale = jnp.exp2(preconditioner_of(bucket).shift(exponent, bucket.group))[:, None, None]
    return Fresh(
        roots=tuple(kept_factor(side.factor * scale, bucket) for side in sides),
        residual=jnp.stack([side.residual for side in sides]).max(axis=0),
        condition=jnp.stack([side.condition for side in sides]).max(axis=0),
        effective_rank=jnp.stack([side.effective_rank for side in sides]).min(axis=0),
        accepted=jnp.stack([side.accepted | (suited & 1 << k > 0) for k, side in enumerate(sides)]).all(axis=0),
        seen=seen,
        suited=suited,
    )
