"""Statistics of gradients, and fresh inverse roots of them for the blocks that are due, accepted only if sound."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import residence
from .blocks import Bucket
from .moments import correction
from .options import ShampooOptions
from .roots import inverse_pth_root

NO_GRADIENT = -1000
# How far an entry of an accepted root may exceed (regulariser x largest eigenvalue)^(-1/p).
NORM_MARGIN = 1.05


class Roots(NamedTuple):
    """What a refresh reads and writes for the blocks of one bucket; axis 0 of every array numbers the slots.

    Attributes:
      statistics: per preconditioned side [n, r, r], of gradients divided by 2^exponent.
      exponent: [n] int32, of the largest gradient entry so far: squares of gradients would leave float32 far sooner
        than gradients do. NO_GRADIENT before the first that is not zero.
      roots: like statistics; zero before the first accepted refresh.
      residual: [n] float32 of the newest accepted roots, the worst side.
      condition: [n] float32, estimate of the condition number of the regularised statistics, the worst side.
      effective_rank: [n] float32, trace / largest eigenvalue of the statistics, the side where it is least.
      refreshed: [n] int32, the step count after which the roots were accepted; 0 before the first.
      failures: [n] int32, refused refreshes in a row.
      refreshes: [n] int32, accepted refreshes in all.
    """

    statistics: tuple[jax.Array, ...]
    exponent: jax.Array
    roots: tuple[jax.Array, ...]
    residual: jax.Array
    condition: jax.Array
    effective_rank: jax.Array
    refreshed: jax.Array
    failures: jax.Array
    refreshes: jax.Array


class Fresh(NamedTuple):
    """What a refresh has found for blocks of one bucket; axis 0 of every array numbers the blocks that were due.

    Attributes:
      roots: per preconditioned side [m, r, r] float32, of the gradients as they are.
      residual, condition: [m] float32, of the worst side.
      effective_rank: [m] float32, of the side where it is least.
      accepted: [m] bool, whether the roots of all sides may be used.
      seen: [m] bool, whether the block has seen a gradient that is not zero: otherwise it has nothing to fail at.
    """

    roots: tuple[jax.Array, ...]
    residual: jax.Array
    condition: jax.Array
    effective_rank: jax.Array
    accepted: jax.Array
    seen: jax.Array


class Due(NamedTuple):
    """The blocks of one bucket that a device refreshes on this step.

    Attributes:
      slot: [window] int32, the device's slots; one past the last where nothing is due.
      sizes: [window, sides of a block] int32, the blocks' real lengths.
    """

    slot: jax.Array
    sizes: jax.Array


def initial_roots(bucket: Bucket, slots: int, options: ShampooOptions) -> Roots:
    """Before the first gradient."""
    lengths = [bucket.shape[side] for side in bucket.sides]
    return Roots(
        statistics=tuple(jnp.zeros((slots, r, r), options.statistics_dtype) for r in lengths),
        exponent=jnp.full(slots, NO_GRADIENT, jnp.int32),
        roots=tuple(jnp.zeros((slots, r, r), options.roots_dtype) for r in lengths),
        residual=jnp.zeros(slots, jnp.float32),
        condition=jnp.zeros(slots, jnp.float32),
        effective_rank=jnp.zeros(slots, jnp.float32),
        refreshed=jnp.zeros(slots, jnp.int32),
        failures=jnp.zeros(slots, jnp.int32),
        refreshes=jnp.zeros(slots, jnp.int32),
    )


def usable(roots: Roots, bucket: Bucket, options: ShampooOptions) -> jax.Array:
    """[n] whether a block has roots to act with, rather than the graft method."""
    if not bucket.sides:
        return jnp.ones_like(roots.refreshed, dtype=bool)
    return (roots.refreshed > 0) & (roots.failures < options.max_failures)


def accumulate(
    roots: Roots, g: jax.Array, bucket: Bucket, *, wanted: jax.Array | bool = True, on_host: bool = False
) -> Roots:
    """L <- beta2 L + (1 - beta2) G G' for each preconditioned side, G unfolded along it; sums where beta2 is 1.

    Args:
      roots: a device's blocks.
      g: [n, *shape] float32, their gradients.
      bucket: theirs.
      wanted: scalar; where it is not, all stays as it is.
      on_host: whether the statistics are in host memory.
    """
    beta2 = bucket.group.beta2
    old, new = (1.0, 1.0) if beta2 == 1 else (beta2, 1 - beta2)
    largest = jnp.max(jnp.abs(g), axis=tuple(range(1, g.ndim)))
    exponent = jnp.maximum(roots.exponent, jnp.where((largest > 0) & wanted, jnp.frexp(largest)[1], NO_GRADIENT))
    one = jnp.float32(1)  # ldexp: a power of two to the last bit, which exp2 need not be
    grown = jnp.ldexp(one, jnp.maximum(2 * (roots.exponent - exponent), -300))[:, None, None]
    scale = jnp.where(largest > 0, jnp.ldexp(one, -exponent), 0).reshape(-1, *[1] * (g.ndim - 1))
    g = jnp.where(scale > 0, g * scale, 0)
    statistics = []
    for side, s_nrr in zip(bucket.sides, roots.statistics, strict=True):
        others = [axis for axis in range(1, g.ndim) if axis != side + 1]

        def renewed(s_nrr: jax.Array, g: jax.Array, grown: jax.Array, others: Sequence[int] = others) -> jax.Array:
            product = lax.dot_general(g, g, ((others, others), ((0,), (0,))), precision=lax.Precision.HIGHEST)
            return (old * grown * s_nrr.astype(jnp.float32) + new * product).astype(s_nrr.dtype)

        statistics.append(residence.updated(s_nrr, renewed, (g, grown), wanted=wanted, on_host=on_host))
    return roots._replace(statistics=tuple(statistics), exponent=exponent)


def precondition(m: jax.Array, roots: Roots, bucket: Bucket) -> jax.Array:
    """Each preconditioned side of the blocks [n, *shape] multiplied by its root: L^(-1/p) M R^(-1/p) for a matrix."""
    for side, x_nrr in zip(bucket.sides, roots.roots, strict=True):
        axis, x_nrr = side + 1, x_nrr.astype(jnp.float32)
        product = lax.dot_general(x_nrr, m, (((2,), (axis,)), ((0,), (0,))), precision=lax.Precision.HIGHEST)
        m = jnp.moveaxis(product, 1, axis)
    return m


def refresh(
    roots: dict[str, Roots], due: dict[str, Due], buckets: Sequence[Bucket], options: ShampooOptions, *, step: jax.Array
) -> dict[str, Roots]:
    """New roots for the due blocks of one device.

    Matrices of one side length, root order and regulariser are solved in one batch, whatever bucket they come from; a
    batch with nothing due is not solved. A root is accepted only if it is finite, its residual is within bound, and so
    is its norm: no entry may exceed (regulariser x largest eigenvalue)^(-1/p) by more than a twentieth. A block accepts
    the roots of all its sides or of none; otherwise it keeps those it has, and its failure count grows.

    Args:
      roots: bucket name -> the device's blocks.
      due: bucket name -> which of them are due.
      buckets: the buckets.
      options: solver and bounds.
      step: count of the steps whose gradients are in the statistics.
    """
    updates = step // options.statistics_every
    batches: dict[tuple[int, int, float, float], list[tuple[Bucket, int]]] = {}
    for bucket in buckets:
        group = bucket.group
        for number, side in enumerate(bucket.sides):
            key = (bucket.shape[side], group.p, group.ridge, group.cut)
            batches.setdefault(key, []).append((bucket, number))

    on_host = options.statistics_memory == "host"
    due_rows = {
        (b.name, number): residence.rows(statistics, due[b.name].slot, on_host=on_host).astype(jnp.float32)
        for b in buckets
        for number, statistics in enumerate(roots[b.name].statistics)
    }
    solved: dict[tuple[str, int], _Solved] = {}
    before = None
    for (_, p, ridge, cut), members in batches.items():
        wanted = jnp.concatenate([due[b.name].slot < roots[b.name].residual.shape[0] for b, _ in members])
        stack = jnp.concatenate(
            [due_rows[b.name, number] / correction(b.group.beta2, updates, options) for b, number in members]
        )
        stack = jnp.where(wanted[:, None, None], stack, 0)
        sizes = jnp.concatenate([due[b.name].sizes[:, b.sides[number]] for b, number in members])
        if before is not None and options.solver == "eigh":
            # Two LAPACK calls in flight can deadlock on a CPU: the next begins when this one has ended.
            stack, before = lax.optimization_barrier((stack, before))
        batch = lax.cond(
            jnp.any(wanted),
            lambda stack, sizes, p=p, ridge=ridge, cut=cut: _solve(stack, sizes, p, ridge, cut, options),
            lambda stack, sizes: _unsolved(stack),
            stack,
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
            seen = [jnp.trace(due_rows[bucket.name, k], axis1=-2, axis2=-1) > 0 for k in numbers]
            sides = [solved[bucket.name, k] for k in numbers]
            fresh = _joined(sides, jnp.stack(seen).all(axis=0), state.exponent.at[slot].get(mode="clip"), bucket)
            result[bucket.name] = install(state, slot, fresh, step)
    return result


def install(state: Roots, slot: jax.Array, fresh: Fresh, step: jax.Array) -> Roots:
    """Accepted roots take the places of the old ones.

    Args:
      state: a device's blocks.
      slot: [m] int32, where the blocks of `fresh` are; past the last for those that are to be left out.
      fresh: what a refresh has found.
      step: count of the steps whose gradients are in the statistics it was made from.
    """

    def old(x: jax.Array) -> jax.Array:
        return x.at[slot].get(mode="clip")

    def put(x: jax.Array, new: jax.Array, keep: jax.Array) -> jax.Array:
        new = jnp.where(keep.reshape(-1, *([1] * (x.ndim - 1))), new, old(x))
        return x.at[slot].set(new.astype(x.dtype), mode="drop")

    accepted = fresh.accepted
    return state._replace(
        roots=tuple(put(x, root, accepted) for x, root in zip(state.roots, fresh.roots, strict=True)),
        residual=put(state.residual, fresh.residual, accepted),
        condition=put(state.condition, fresh.condition, accepted),
        effective_rank=put(state.effective_rank, fresh.effective_rank, accepted),
        refreshed=put(state.refreshed, step, accepted),
        failures=put(state.failures, jnp.where(accepted, 0, old(state.failures) + 1), accepted | fresh.seen),
        refreshes=put(state.refreshes, old(state.refreshes) + 1, accepted),
    )


class _Solved(NamedTuple):
    root: jax.Array
    residual: jax.Array
    condition: jax.Array
    effective_rank: jax.Array
    accepted: jax.Array


def _solve(
    stack_nrr: jax.Array, sizes_n: jax.Array, p: int, ridge: float, cut: float, options: ShampooOptions
) -> _Solved:
    result = inverse_pth_root(stack_nrr, p, solver=options.solver, ridge=ridge, cut=cut, sizes_n=sizes_n)
    accepted = (result.residual <= options.residual_bound) & (result.largest > 0)
    accepted &= jnp.all(jnp.isfinite(result.root), axis=(-2, -1))
    if ridge or cut:
        bound = NORM_MARGIN * ((ridge or cut) * result.largest) ** (-1 / p)
        accepted &= jnp.max(jnp.abs(result.root), axis=(-2, -1)) <= bound
    return _Solved(result.root, result.residual, result.condition, result.effective_rank, accepted)


def _unsolved(stack_nrr: jax.Array) -> _Solved:
    nothing = jnp.zeros(len(stack_nrr))
    return _Solved(stack_nrr, nothing, nothing, nothing, nothing > 0)


def _joined(sides: Sequence[_Solved], seen: jax.Array, exponent: jax.Array, bucket: Bucket) -> Fresh:
    """What was solved side by side, as one answer for each block."""
    # Roots of the gradients as they are: A = 2^(2 exponent) x statistics, hence 2^(-2 exponent / p) x their root.
    scale = jnp.exp2(-2.0 * exponent / bucket.group.p)[:, None, None]
    return Fresh(
        roots=tuple(side.root * scale for side in sides),
        residual=jnp.stack([side.residual for side in sides]).max(axis=0),
        condition=jnp.stack([side.condition for side in sides]).max(axis=0),
        effective_rank=jnp.stack([side.effective_rank for side in sides]).min(axis=0),
        accepted=jnp.stack([side.accepted for side in sides]).all(axis=0),
        seen=seen,
    )
