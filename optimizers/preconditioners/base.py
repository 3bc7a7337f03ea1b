"""Interface of a preconditioner: observe gradients, act on a momentum and solve for new factors.

Everything else is common: cutting blocks, moving them to owners, momenta, the refresh schedule and installing factors.
Arguments `bucket` are `plan.blocks.Bucket`, arguments `options` are `options.Options`.
Shapes: n blocks, r the length of a side, s the shape of a block.
"""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ..linalg.roots import RootResult

NO_GRADIENT = -1000


class PreconditionerState(NamedTuple):
    """Statistics and roots of the blocks of one bucket. Axis 0 of every array is the slots.

    Attributes:
      statistics: [n, r, r] float32 per preconditioned side, packed (`linalg.symmetric`), of gradients divided by
        2^scale_log2, whose squares then cannot overflow.
      scale_log2: [n] int32, binary scale of the largest gradient entry so far; NO_GRADIENT before the first gradient
        that is not zero.
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
    roots: tuple[jax.Array, ...]
    roots_scale_log2: jax.Array
    second_moment: jax.Array | None
    residual: jax.Array
    condition: jax.Array
    effective_rank: jax.Array
    refreshed: jax.Array
    failures: jax.Array
    refreshes: jax.Array


class Preconditioner(abc.ABC):
    """A preconditioner.

    Attributes:
      name: key in checkpoints.
      side: default for a treatment's `side`: "both", "short", "left" or "right".
      statistics: kind of statistics; preconditioners of the same kind can take over each other's statistics.
      grafts: whether updates get the graft's norm, and the graft's direction before the first factors. Directions must
        then be linear in the momentum.
      adapts: whether it keeps an elementwise second moment in its own basis.
      warm: whether a refresh starts from the current factors.
      matrices_only: whether blocks must have two sides.
      has_exponent: whether a treatment may set its exponent.
    """

    name = ""
    side = "both"
    statistics = "second moments"
    grafts = True
    adapts = False
    warm = False
    matrices_only = False
    has_exponent = False

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
        del options
        return False

    @abc.abstractmethod
    def order(self, exponent: float | None, sides: int) -> int:
        """Return the order p of the inverse roots, or 0 if no side has statistics.

        Raises:
          ValueError: the exponent is invalid for this preconditioner.
        """

    @abc.abstractmethod
    def title(self, p: int) -> str:
        """Return a short name for tables, shown after a block's shape."""

    def observed(self, g: jax.Array, state: PreconditionerState, bucket: Any, sizes: jax.Array, side: int) -> jax.Array:
        """Return the arrays [n, *s] whose second moments along `side` are the side's statistics.

        Args:
          g: [n, *s] float32, gradients divided by 2^scale_log2, zero in the padding.
          state: state of the blocks.
          bucket: bucket of the blocks.
          sizes: [n, sides of a block] int32, side lengths without padding.
          side: index of a preconditioned side.
        """
        del state, bucket, sizes, side
        return g

    @abc.abstractmethod
    def act(
        self,
        m: jax.Array,
        g: jax.Array,
        state: PreconditionerState,
        bucket: Any,
        sizes: jax.Array,
        step: jax.Array,
        options: Any,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return (direction [n, *s], new second moment).

        Args:
          m: [n, *s] float32, momentum.
          g: [n, *s] float32, gradient.
          state: state after the previous step.
          bucket: bucket of the blocks.
          sizes: [n, sides of a block] int32, side lengths without padding.
          step: int32, number of this step, from 1.
          options: options of the optimizer.
        """

    def solve(self, stack: jax.Array, old: jax.Array | None, sizes: jax.Array, bucket: Any, options: Any) -> RootResult:
        """Return factors for a batch of statistics, and which are accepted, on a device.

        Args:
          stack: [n, r, r] float32, bias-corrected statistics; zero for blocks that are not due.
          old: [n, r, r] float32, current factors, zero before the first; None unless `warm`.
          sizes: [n] int32, side lengths without padding.
          bucket: a bucket of the batch; all have the same p, ridge and cut.
          options: options of the optimizer.
        """
        raise AssertionError(f"{self.name} keeps no statistics")

    def solve_on_host(self, a: np.ndarray, bucket: Any, options: Any) -> tuple[RootResult, int]:
        """Return (result, number of retries) for the statistics of one side.

        Args:
          a: [r, r] float64, without padding.
          bucket: bucket of the block.
          options: options of the optimizer.
        """
        raise AssertionError(f"{self.name} keeps no statistics")

    def carried(
        self, second_moment: jax.Array, old: Sequence[jax.Array], new: Sequence[jax.Array], sides: Sequence[int]
    ) -> jax.Array:
        """Return the second moment [n, *s] in the basis `new`, given that in the basis `old`."""
        raise AssertionError(f"{self.name} keeps no second moment")


def multiplied(x: jax.Array, factors: Sequence[jax.Array], sides: Sequence[int]) -> jax.Array:
    """Return blocks [n, *s] with each side in `sides` multiplied by its factor [n, r, r] from the left."""
    for side, factor in zip(sides, factors, strict=True):
        product = jax.lax.dot_general(
            factor.astype(x.dtype), x, (((2,), (side + 1,)), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST
        )
        x = jax.numpy.moveaxis(product, 1, side + 1)
    return x
