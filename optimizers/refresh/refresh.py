"""Statistics of gradients, and new factors from them for the blocks that are due, installed only if accepted."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..kept import NO_GRADIENT, Roots, blocks_of, factors, preconditioner_of, rows, statistics_of
from ..linalg.roots import RootResult
from ..linalg.symmetric import pack
from ..options import Options
from ..plan.blocks import Bucket
from ..update.moments import correction


class Due(NamedTuple):
    """The blocks of one bucket that a device refreshes in a step.

    Attributes:
      slot: [window] int32, the device's slots; one past the last where nothing is due.
      sizes: [window, sides of a block] int32, the blocks' real lengths.
    """

    slot: Any
    sizes: Any


def accumulate(roots: Roots, g: jax.Array, bucket: Bucket, sizes: jax.Array) -> Roots:
    """L <- beta2 L + (1 - beta2) G G' for each preconditioned side, G unfolded along it; sums where beta2 is 1.

    Args:
      roots: a device's blocks.
      g: [n, *shape] float32, their gradients.
      bucket: their bucket.
      sizes: [n, sides of a block] int32, their real lengths.
    """
    beta2, preconditioner = bucket.group.beta2, preconditioner_of(bucket)
    old, new = (1.0, 1.0) if beta2 == 1 else (beta2, 1 - beta2)
    largest = jnp.max(jnp.abs(g), axis=tuple(range(1, g.ndim)))
    exponent = jnp.maximum(roots.exponent, jnp.where(largest > 0, jnp.frexp(largest)[1], NO_GRADIENT))
    one = jnp.float32(1)  # ldexp gives powers of two to the last bit, which exp2 may not
    grown = _power(preconditioner.power(len(bucket.sides)) * jnp.maximum(roots.exponent - exponent, -150))
    grown = grown[:, None, None]
    scale = jnp.where(largest > 0, jnp.ldexp(one, -exponent), 0).reshape(-1, *[1] * (g.ndim - 1))
    g = jnp.where(scale > 0, g * scale, 0)
    blocks = blocks_of(roots._replace(exponent=exponent), bucket, sizes)
    statistics = []
    for kept, side in zip(roots.statistics, bucket.sides, strict=True):
        x = preconditioner.observed(g, blocks, side)
        others = [axis for axis in range(1, x.ndim) if axis != side + 1]
        product = lax.dot_general(x, x, ((others, others), ((0,), (0,))), precision=lax.Precision.HIGHEST)
        statistics.append(old * grown * kept + new * pack(product))
    return roots._replace(statistics=tuple(statistics), exponent=exponent)


def _power(exponent: jax.Array) -> jax.Array:
    """2^exponent, to the last bit where it is whole."""
    whole = jnp.floor(exponent)
    return jnp.ldexp(jnp.exp2(exponent - whole), whole.astype(jnp.int32))


def refresh(
    roots: dict[str, Roots], due: dict[str, Due], buckets: Sequence[Bucket], options: Options, *, step: jax.Array
) -> dict[str, Roots]:
    """Solve for the due blocks of one device and install the factors that are accepted.

    Matrices of one side length, preconditioner, root order and regulariser are solved in one batch, across buckets; a
    batch with nothing due is skipped. A block accepts the factors of all its sides or of none; otherwise it keeps its
    old ones, and its failure count grows.

    Args:
      roots: bucket name -> the device's blocks.
      due: bucket name -> its blocks that are due.
      buckets: the buckets.
      options: solver and bounds.
      step: count of the steps whose gradients are in the statistics.
    """
    updates = step // options.statistics_every
    batches: dict[Any, list[tuple[Bucket, int]]] = {}
    for bucket in buckets:
        group = bucket.group
        for number, side in enumerate(bucket.sides):
            key = (group.preconditioner, bucket.shape[side], group.p, group.ridge, group.cut)
            batches.setdefault(key, []).append((bucket, number))

    def statistics(bucket: Bucket, number: int) -> jax.Array:
        kept = roots[bucket.name].statistics[number].at[due[bucket.name].slot].get(mode="clip")
        return statistics_of(kept, bucket, number) / correction(bucket.group.beta2, updates, options)

    found: dict[tuple[str, int], RootResult] = {}
    before = None
    for members in batches.values():
        group, preconditioner = members[0][0].group, preconditioner_of(members[0][0])
        wanted = jnp.concatenate([due[b.name].slot < len(roots[b.name].residual) for b, _ in members])
        stack = jnp.concatenate([statistics(b, number) for b, number in members])
        stack = jnp.where(wanted[:, None, None], stack, 0)
        sizes = jnp.concatenate([due[b.name].sizes[:, b.sides[number]] for b, number in members])
        old = None
        if preconditioner.warm:
            old = jnp.concatenate([factors(rows(roots[b.name], due[b.name].slot))[number] for b, number in members])
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
            found[bucket.name, number] = jax.tree.map(lambda x, part=part: x[part], batch)
            first = part.stop

    result = dict(roots)
    for bucket in buckets:
        if bucket.sides:
            state, slot = roots[bucket.name], due[bucket.name].slot
            sides = [found[bucket.name, number] for number in range(len(bucket.sides))]
            # Roots are of the gradients as they are.
            exponent = state.exponent.at[slot].get(mode="clip")
            scale = jnp.exp2(preconditioner_of(bucket).shift(exponent, bucket.group))[:, None, None]
            block = _joined([side._replace(root=side.root * scale) for side in sides])
            result[bucket.name] = install(state, slot, block, step, bucket)
    return result


def install(state: Roots, slot: jax.Array, new: RootResult, step: jax.Array, bucket: Bucket) -> Roots:
    """Put accepted factors into their slots.

    Args:
      state: a device's blocks.
      slot: [m] int32, the slots of the blocks in `new`; past the last for blocks to ignore.
      new: result of a refresh, with a tuple of roots, one for each preconditioned side.
      step: count of the steps whose gradients are in the statistics.
      bucket: the blocks' bucket.
    """
    accepted, seen = new.accepted, new.largest > 0

    def old(x: jax.Array) -> jax.Array:
        return x.at[slot].get(mode="clip")

    def put(x: jax.Array, new: jax.Array, changed: jax.Array = accepted) -> jax.Array:
        new = jnp.where(changed.reshape(-1, *([1] * (x.ndim - 1))), new, old(x))
        return x.at[slot].set(new.astype(x.dtype), mode="drop")

    second_moment = state.second_moment
    if second_moment is not None:
        carried = preconditioner_of(bucket).carried(
            old(second_moment), factors(rows(state, slot)), new.root, bucket.sides
        )
        second_moment = put(second_moment, carried)
    return state._replace(
        second_moment=second_moment,
        roots=tuple(put(x, root) for x, root in zip(state.roots, new.root, strict=True)),
        residual=put(state.residual, new.residual),
        condition=put(state.condition, new.condition),
        effective_rank=put(state.effective_rank, new.effective_rank),
        refreshed=put(state.refreshed, step),
        failures=put(state.failures, jnp.where(accepted, 0, old(state.failures) + 1), accepted | seen),
        refreshes=put(state.refreshes, old(state.refreshes) + 1),
    )


def _unsolved(stack_nrr: jax.Array) -> RootResult:
    nothing = jnp.zeros(len(stack_nrr), jnp.float32)
    return RootResult(stack_nrr, nothing, nothing, nothing, nothing, nothing > 0)


def _joined(sides: Sequence[RootResult]) -> RootResult:
    """Join the results of all sides: the worst number of each block, accepted only if all sides are."""
    root, residual, largest, condition, rank, accepted = zip(*sides, strict=True)
    return RootResult(
        root=root,
        residual=jnp.stack(residual).max(axis=0),
        largest=jnp.stack(largest).min(axis=0),
        condition=jnp.stack(condition).max(axis=0),
        effective_rank=jnp.stack(rank).min(axis=0),
        accepted=jnp.stack(accepted).all(axis=0),
    )
