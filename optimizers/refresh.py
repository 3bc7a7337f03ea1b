"""Fresh inverse roots for the blocks that are due, accepted only if they can be trusted."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .blocks import Bucket
from .options import ShampooOptions
from .roots import inverse_pth_root

NO_GRADIENT = -1000


class Roots(NamedTuple):
    """What a refresh reads and writes for the blocks of one bucket; axis 0 of every array numbers the slots.

    Attributes:
      statistics: per preconditioned side [n, r, r] (and [n, c, c]), of gradients divided by 2^exponent.
      exponent: [n] int32, of the largest gradient entry so far: squares of gradients would leave float32 far sooner
        than gradients do. NO_GRADIENT before the first that is not zero.
      roots: like statistics; zero before the first accepted refresh.
      residual: [n] float32 of the newest accepted roots, the worse side.
      refreshed: [n] int32, the step count after which the roots were accepted; 0 before the first.
      failures: [n] int32, refused refreshes in a row.
      refreshes: [n] int32, accepted refreshes in all.
    """

    statistics: tuple[jax.Array, ...]
    exponent: jax.Array
    roots: tuple[jax.Array, ...]
    residual: jax.Array
    refreshed: jax.Array
    failures: jax.Array
    refreshes: jax.Array


class Due(NamedTuple):
    """The blocks of one bucket that a device refreshes on this step.

    Attributes:
      slot: [window] int32, the device's slots; one past the last where nothing is due.
      sizes: [window, 2] int32, real rows and columns of the blocks.
    """

    slot: jax.Array
    sizes: jax.Array


def refresh(
    roots: dict[str, Roots],
    due: dict[str, Due],
    buckets: Sequence[Bucket],
    options: ShampooOptions,
    *,
    correction: jax.Array,
    step: jax.Array,
) -> dict[str, Roots]:
    """New roots for the due blocks of one device.

    Matrices of one side length and root order are solved in one batch, whatever bucket they come from; a batch with
    nothing due is not solved. A root is accepted only if it is finite, its residual is within bound, and so is its
    norm: no entry may exceed (regulariser x largest eigenvalue)^(-1/p) by more than a twentieth. A block accepts the
    roots of all its sides or of none; otherwise it keeps those it has, and its failure count grows.

    Args:
      roots: bucket name -> the device's blocks.
      due: bucket name -> which of them are due.
      buckets: the buckets.
      options: solver, regulariser and bounds.
      correction: the statistics' bias correction, a divisor.
      step: count of the steps whose gradients are in the statistics.
    """
    batches: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for bucket in buckets:
        for side in range(len(roots[bucket.name].statistics)):
            length = (bucket.rows, bucket.cols)[side]
            batches.setdefault((length, bucket.order), []).append((bucket.name, side))

    solved: dict[tuple[str, int], tuple[jax.Array, jax.Array, jax.Array]] = {}
    for (_, order), members in batches.items():
        statistics = [roots[name].statistics[side].at[due[name].slot].get(mode="clip") for name, side in members]
        wanted = jnp.concatenate([due[name].slot < roots[name].residual.shape[0] for name, _ in members])
        stack = jnp.where(wanted[:, None, None], jnp.concatenate(statistics) / correction, 0)
        sizes = jnp.concatenate([due[name].sizes[:, side] for name, side in members])
        root, residual, accepted = lax.cond(
            jnp.any(wanted),
            lambda stack, sizes, order=order: _solve(stack, sizes, order, options),
            lambda stack, sizes: (stack, jnp.ones(len(stack)), jnp.zeros(len(stack), bool)),
            stack,
            sizes,
        )
        first = 0
        for name, side in members:
            part = slice(first, first + due[name].slot.shape[0])
            solved[name, side] = root[part], residual[part], accepted[part]
            first = part.stop

    result = {}
    for bucket in buckets:
        state, slot = roots[bucket.name], due[bucket.name].slot
        sides = [solved[bucket.name, side] for side in range(len(state.statistics))]
        residual = jnp.stack([residual for _, residual, _ in sides]).max(axis=0)
        accepted = jnp.stack([accepted for _, _, accepted in sides]).all(axis=0)
        # A block that has seen nothing but zero gradients has nothing to fail at.
        trace = [jnp.trace(s.at[slot].get(mode="clip"), axis1=-2, axis2=-1) for s in state.statistics]
        seen = jnp.stack(trace).all(axis=0)

        def put(x: jax.Array, new: jax.Array, keep: jax.Array, slot: jax.Array = slot) -> jax.Array:
            old = x.at[slot].get(mode="clip")
            new = jnp.where(keep.reshape(-1, *([1] * (x.ndim - 1))), new, old)
            return x.at[slot].set(new.astype(x.dtype), mode="drop")

        failures = state.failures.at[slot].get(mode="clip")
        # Roots of the gradients as they are: A = 2^(2 exponent) x statistics, hence 2^(-2 exponent / p) x their root.
        scale = jnp.exp2(-2.0 * state.exponent.at[slot].get(mode="clip") / bucket.order)[:, None, None]
        result[bucket.name] = Roots(
            statistics=state.statistics,
            exponent=state.exponent,
            roots=tuple(put(old, new * scale, accepted) for old, (new, _, _) in zip(state.roots, sides, strict=True)),
            residual=put(state.residual, residual, accepted),
            refreshed=put(state.refreshed, step, accepted),
            failures=put(state.failures, jnp.where(accepted, 0, failures + 1), accepted | seen),
            refreshes=put(state.refreshes, state.refreshes.at[slot].get(mode="clip") + 1, accepted),
        )
    return result


def _solve(
    stack_nrr: jax.Array, sizes_n: jax.Array, order: int, options: ShampooOptions
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Roots [n, r, r], residuals [n] and whether each root by itself is acceptable [n]."""
    result = inverse_pth_root(
        stack_nrr, order, solver=options.solver, ridge=options.ridge, cut=options.cut, sizes_n=sizes_n
    )
    accepted = (result.residual <= options.residual_bound) & (result.largest > 0)
    accepted &= jnp.all(jnp.isfinite(result.root), axis=(-2, -1))
    regulariser = options.ridge or options.cut
    if regulariser:
        bound = 1.05 * (regulariser * result.largest) ** (-1 / order)
        accepted &= jnp.max(jnp.abs(result.root), axis=(-2, -1)) <= bound
    return result.root, result.residual, accepted
