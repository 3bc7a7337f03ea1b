"""The contract of a preconditioner: how it observes gradients, acts on a momentum and solves for new factors.

The engine cuts gradients into blocks, brings these to their owners, keeps momenta, decides which blocks are due and
installs what was found for them. Everything that differs between preconditioners is here. A preconditioner receives a
bucket (`plan.blocks.Bucket`) for its `shape`, `sides`, `p` and `treatment`, and the options (`options.Options`).
Shapes in names: n blocks, r a side's length, s the shape of a block.
"""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ..linalg.roots import RootResult

NO_GRADIENT = -1000


class PreconditionerState(NamedTuple):
    """Statistics and roots of the blocks of one bucket; axis 0 of every array numbers the slots.

    Attributes:
      statistics: per preconditioned side [n, r, r] float32, packed (`linalg.symmetric`), of gradients divided by
        2^scale_log2.
      scale_log2: [n] int32, of the largest gradient entry so far. Squares of gradients would overflow float32 far
        sooner than gradients. NO_GRADIENT before the first gradient that is not zero.
      roots: per preconditioned side [n, r, r], the factor that acts on it: an inverse root or a basis. Zero before the
        first accepted refresh.
      roots_scale_log2: [n] int32, `scale_log2` when the roots were solved; they are roots of gradients divided by it.
      second_moment: [n, *s] float32, of the gradients in the preconditioner's basis; None if it keeps none.
      residual: [n] float32 of the newest accepted roots, the worst side.
      condition: [n] float32, estimated condition number of the regularised statistics, the worst side.
      effective_rank: [n] float32, trace / largest eigenvalue of the statistics, the side with the smallest value.
      refreshed: [n] int32, step count after which the roots were accepted; 0 before the first.
      failures: [n] int32, refused refreshes in a row.
      refreshes: [n] int32, accepted refreshes in all.
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
      side: the preconditioned sides unless a treatment says otherwise: "both", "short", "left" or "right".
      statistics: kind of statistics, in a word; a state can be taken over by a preconditioner with the same kind.
      grafts: whether updates get the graft's norm, and the graft's direction before there are factors. Its directions
        must be linear in the momentum.
      adapts: whether it keeps a second moment for each element of a block in its own basis.
      warm: whether a refresh starts from the current factor.
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
        """Return the degree of the statistics of one of `sides` sides in the gradient."""
        del sides
        return 2.0

    def degree(self, bucket: Any) -> float:
        """Return the degree of all factors together in the scale of the gradient: how much of it acting removes."""
        sides = len(bucket.sides)
        return self.power(sides) * sides / bucket.p if bucket.p else 0.0

    def uses_lapack(self, options: Any) -> bool:
        """Whether `solve` calls LAPACK on CPUs."""
        del options
        return False

    @abc.abstractmethod
    def order(self, exponent: float | None, sides: int) -> int:
        """Return the p of each side's inverse p-th root; 0 if no side has statistics.

        Raises:
          ValueError: it cannot have this exponent.
        """

    @abc.abstractmethod
    def title(self, p: int) -> str:
        """Return a name for tables, to follow a block's shape."""

    def observed(self, g: jax.Array, state: PreconditionerState, bucket: Any, sizes: jax.Array, side: int) -> jax.Array:
        """Return what the statistics of a side are the second moments of: [n, *s], unfolded along that side.

        Args:
          g: [n, *s] float32, gradients divided by 2^scale_log2.
          state: of the blocks.
          bucket: of the blocks.
          sizes: [n, sides of a block] int32, real lengths; the rest is padding, and zero.
          side: one of the preconditioned sides.
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
          g: [n, *s] float32, the gradient.
          state: of the step before.
          bucket: of the blocks.
          sizes: [n, sides of a block] int32, real lengths.
          step: number of this step, from 1.
          options: of the optimizer.
        """

    def solve(self, stack: jax.Array, old: jax.Array | None, sizes: jax.Array, bucket: Any, options: Any) -> RootResult:
        """Return factors for a batch of statistics, and which of them are accepted; on a device.

        Args:
          stack: [n, r, r] float32, bias-corrected; zero where nothing is due.
          old: [n, r, r] float32, the current factors, zero before the first; None unless `warm`.
          sizes: [n] int32, real lengths.
          bucket: a bucket of the batch; all have the same p, ridge and cut.
          options: of the optimizer.
        """
        raise AssertionError(f"{self.name} keeps no statistics")

    def solve_on_host(self, a: np.ndarray, bucket: Any, options: Any) -> tuple[RootResult, int]:
        """Return (result, number of retries) for the statistics of one side, float64.

        Args:
          a: [r, r], without padding.
          bucket: of the block.
          options: of the optimizer.
        """
        raise AssertionError(f"{self.name} keeps no statistics")

    def carried(
        self, second_moment: jax.Array, old: Sequence[jax.Array], new: Sequence[jax.Array], sides: Sequence[int]
    ) -> jax.Array:
        """Return the second moment [n, *s] of blocks whose factors change from `old` to `new`."""
        raise AssertionError(f"{self.name} keeps no second moment")


def multiplied(x: jax.Array, factors: Sequence[jax.Array], sides: Sequence[int]) -> jax.Array:
    """Return blocks [n, *s] with each of some sides multiplied by its matrix [n, r, r] from the left."""
    for side, factor in zip(sides, factors, strict=True):
        product = jax.lax.dot_general(
            factor.astype(x.dtype), x, (((2,), (side + 1,)), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST
        )
        x = jax.numpy.moveaxis(product, 1, side + 1)
    return x
