"""Interface of a preconditioner: its statistics, its factors, and how they act on a momentum.

Everything else is common: cutting blocks, moving them to owners, momenta, the refresh schedule and installing factors.
Shapes: n blocks, r the length of a side, s the shape of a block.
"""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..linalg.precision import FULL
from ..linalg.roots import RootResult
from ..linalg.scaling import exponent_of, power_of, power_of_two
from ..linalg.symmetric import pack

NO_GRADIENT = -1000


class PreconditionerState(NamedTuple):
    """Statistics and roots of the blocks of one bucket. Axis 0 of every array is the slots.

    Attributes:
      statistics: [n, r, r] float32 per preconditioned side, packed (`linalg.symmetric`), of gradients divided by
        2^scale_log2, whose squares then cannot overflow.
      scale_log2: [n] int32, binary scale of the largest gradient entry so far; NO_GRADIENT before the first gradient
        that is not zero.
      age: [n] int32, number of steps in the statistics.
      roots: [n, r, r] per preconditioned side, inverse root or basis; zero before the first accepted refresh.
      roots_scale_log2: [n] int32, `scale_log2` of the statistics that the roots were computed from.
      second_moment: [n, *s] float32, second moment of the gradients in the preconditioner's basis, or None.
      residual: [n] float32, residual of the latest accepted roots, maximum over sides.
      condition: [n] float32, estimated condition number of the regularised statistics, maximum over sides.
      effective_rank: [n] float32, trace / largest eigenvalue of the statistics, minimum over sides.
      refreshed: [n] int32, step count of the latest accepted refresh; 0 before the first.
      failures: [n] int32, rejected refreshes in a row.
      refreshes: [n] int32, number of accepted refreshes.
    """

    statistics: tuple[jax.Array, ...]
    scale_log2: jax.Array
    age: jax.Array
    roots: tuple[jax.Array, ...]
    roots_scale_log2: jax.Array
    second_moment: jax.Array | None
    residual: jax.Array
    condition: jax.Array
    effective_rank: jax.Array
    refreshed: jax.Array
    failures: jax.Array
    refreshes: jax.Array


class Blocks(NamedTuple):
    """The blocks that a preconditioner works on.

    Attributes:
      bucket: `plan.blocks.Bucket` of the blocks.
      sizes: [n, sides of a block] int32, side lengths without padding.
      options: `options.Options` of the optimizer.
    """

    bucket: Any
    sizes: jax.Array
    options: Any


class Preconditioner(abc.ABC):
    """A preconditioner.

    Attributes:
      name: key in checkpoints.
      label: short name for tables, shown after a block's shape; empty for a name such as "p4".
      side: default for a treatment's `side`: "both", "short", "left" or "right".
      statistics: kind of statistics; preconditioners of the same kind can take over each other's statistics.
      grafts: whether updates get the graft's norm, and the graft's direction before the first factors. Directions must
        then be linear in the momentum.
      adapts: whether it keeps an elementwise second moment in its own basis.
      warm: whether a refresh starts from the current factors.
      matrices_only: whether blocks must have two sides.
      orthogonal: whether its directions are orthogonalised already.
      p: order of the inverse roots, 0 if no side has statistics; None if the treatment's exponent gives it.
    """

    name = ""
    label = ""
    side = "both"
    statistics = "second moments"
    grafts = True
    adapts = False
    warm = False
    matrices_only = False
    orthogonal = False
    p: int | None = None

    def power(self, sides: int) -> float:
        """Return the degree of one side's statistics in the gradient, for `sides` preconditioned sides."""
        del sides
        return 2.0

    def degree(self, bucket: Any) -> float:
        """Return the power of the gradient's scale that all factors together divide by."""
        sides = len(bucket.sides)
        return self.power(sides) * sides / bucket.p if bucket.p else 0.0

    def uses_lapack(self, options: Any) -> bool:
        """Return whether `solve` calls LAPACK on CPUs."""
        return options.solver == "eigh"

    def accumulate(self, state: PreconditionerState, g: jax.Array, blocks: Blocks) -> PreconditionerState:
        """Update the statistics: L <- beta2 L + (1 - beta2) X X', with X = `observed` unfolded along each side.

        With beta2 = 1 they are sums.

        Args:
          state: state of the blocks.
          g: [n, *s] float32, gradients.
          blocks: the blocks.
        """
        bucket = blocks.bucket
        old, new = (1.0, 1.0) if bucket.beta2 == 1 else (bucket.beta2, 1 - bucket.beta2)
        largest = jnp.max(jnp.abs(g), axis=tuple(range(1, g.ndim)))
        scale_log2 = jnp.maximum(state.scale_log2, jnp.where(largest > 0, exponent_of(largest), NO_GRADIENT))
        change = power_of(self.power(len(bucket.sides)), state.scale_log2 - scale_log2)
        change = jnp.where(change > -126, power_of_two(change), 0)[:, None, None]
        g = g * jnp.where(largest > 0, power_of_two(-scale_log2), 0).reshape(-1, *[1] * (g.ndim - 1))
        begins = (state.scale_log2 == NO_GRADIENT)[:, None, None]
        state, statistics = state._replace(scale_log2=scale_log2), []
        for kept, side in zip(state.statistics, bucket.sides, strict=True):
            kept = change * kept
            if self.prior(len(bucket.sides)):
                kept = jnp.where(begins, new * pack(self.first(g, blocks, side)), kept)
            x = self.observed(g, state, blocks, side)
            others = [axis for axis in range(1, x.ndim) if axis != side + 1]
            product = lax.dot_general(x, x, ((others, others), ((0,), (0,))), precision=bucket.precision.statistics)
            statistics.append(old * kept + new * pack(product))
        return state._replace(statistics=tuple(statistics), age=state.age + 1)

    def prior(self, sides: int) -> int:
        """Return how many gradients the statistics of `sides` preconditioned sides count before the first: 0, or 1.

        The bias correction of an average counts it too.
        """
        del sides
        return 0

    def first(self, g: jax.Array, blocks: Blocks, side: int) -> jax.Array:
        """Return what that gradient adds to the statistics [n, r, r] of a side."""
        raise AssertionError(f"the statistics of {self.name} begin at zero")

    def observed(self, g: jax.Array, state: PreconditionerState, blocks: Blocks, side: int) -> jax.Array:
        """Return the arrays [n, *s] whose second moments along `side` are the side's statistics.

        Args:
          g: [n, *s] float32, gradients divided by 2^scale_log2, zero in the padding.
          state: state of the blocks.
          blocks: the blocks.
          side: index of a preconditioned side.
        """
        del state, blocks, side
        return g

    @abc.abstractmethod
    def act(
        self, m: jax.Array, g: jax.Array, state: PreconditionerState, age: jax.Array, blocks: Blocks
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return (direction [n, *s], new second moment).

        Args:
          m: [n, *s] float32, momentum.
          g: [n, *s] float32, gradient.
          state: state after the previous step.
          age: [n] int32, number of steps in the momentum and the second moment, with this one.
          blocks: the blocks.
        """

    def solve(self, stack: jax.Array, old: jax.Array | None, blocks: Blocks) -> RootResult:
        """Return factors for a batch of statistics of one side, and which are accepted, on a device.

        Args:
          stack: [n, r, r] float32, bias-corrected statistics; zero for blocks that are not due.
          old: [n, r, r] float32, current factors, zero before the first; None unless `warm`.
          blocks: a bucket of the batch, whose buckets have the same p, ridge and cut; `sizes` is [n], of the side.
        """
        raise AssertionError(f"{self.name} keeps no statistics")

    def solve_on_host(self, a: np.ndarray, bucket: Any, options: Any) -> tuple[RootResult, int]:
        """Return (result, number of retries) for the statistics [r, r] float64 of one side, without padding."""
        raise AssertionError(f"{self.name} keeps no statistics")

    def carried(
        self, second_moment: jax.Array, old: Sequence[jax.Array], new: Sequence[jax.Array], sides: Sequence[int]
    ) -> jax.Array:
        """Return the second moment [n, *s] in the basis `new`, given that in the basis `old`."""
        raise AssertionError(f"{self.name} keeps no second moment")


def multiplied(x: jax.Array, factors: Sequence[jax.Array], sides: Sequence[int], precision: Any = FULL) -> jax.Array:
    """Return blocks [n, *s] with each side in `sides` multiplied by its factor [n, r, r] from the left."""
    for side, factor in zip(sides, factors, strict=True):
        product = lax.dot_general(factor.astype(x.dtype), x, (((2,), (side + 1,)), ((0,), (0,))), precision=precision)
        x = jnp.moveaxis(product, 1, side + 1)
    return x
