"""What the engine asks of a preconditioner: what to observe, how to act, what a refresh computes.

The engine cuts gradients into blocks, brings these to their owners, keeps momenta, decides which blocks are due and
installs what was found for them, staggered, periodically or from the host. All that a preconditioner adds is here.
Shapes in names: n blocks, r a side's length, s the shape of a block.
"""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ..linalg.roots import RootResult


class Blocks(NamedTuple):
    """Blocks of one bucket on their device, as preconditioners see them; axis 0 of every array numbers them.

    Attributes:
      sides: which sides of a block are preconditioned.
      factors: per preconditioned side [n, r, r] float32, found by the newest accepted refresh; zero before the first.
      found: [n] bool, whether there was one.
      exponent: [n] int32, statistics are of gradients divided by 2^exponent.
      second_moment: [n, *s] float32, of a preconditioner that adapts; None otherwise.
      sizes: [n, sides of a block] int32, real lengths; the rest is padding, and zero.
      group: what the blocks have in common (`blocks.Group`).
    """

    sides: Sequence[int]
    factors: Sequence[jax.Array]
    found: jax.Array
    exponent: jax.Array
    second_moment: jax.Array | None
    sizes: jax.Array
    group: Any


class Preconditioner(abc.ABC):
    """One of the family.

    Attributes:
      name: under which a checkpoint knows it.
      side: which sides it takes where a treatment does not say: "both" (all of them), "short", "left" or "right".
      statistics: what its statistics are, in a word; states of the same word can be taken over from each other.
      grafts: whether its updates have the graft's norm, and the graft's direction before there are factors.
      adapts: whether it keeps a second moment for each element of a block as it sees it.
      warm: whether a refresh starts from the factor that is there.
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
        """How many powers of the gradient's scale the statistics of one of so many sides have."""
        del sides
        return 2.0

    def uses_lapack(self, group: Any, options: Any) -> bool:
        """Whether `solve` calls LAPACK on CPUs."""
        del group, options
        return False

    @abc.abstractmethod
    def order(self, exponent: float | None, sides: int) -> int:
        """The p of each side's inverse p-th root, 0 where no side has statistics.

        Raises:
          ValueError: the exponent is none that it can have.
        """

    @abc.abstractmethod
    def title(self, p: int) -> str:
        """For tables, after a block's shape."""

    def observed(self, g: jax.Array, blocks: Blocks, side: int) -> jax.Array:
        """What the statistics of a side are the second moments of: [n, *s], unfolded along that side.

        Args:
          g: [n, *s] float32, gradients divided by 2^exponent.
          blocks: theirs.
          side: one of the preconditioned.
        """
        del blocks, side
        return g

    @abc.abstractmethod
    def act(
        self, m: jax.Array, g: jax.Array, blocks: Blocks, step: jax.Array, options: Any
    ) -> tuple[jax.Array, jax.Array | None]:
        """(direction [n, *s], new second moment).

        Args:
          m: [n, *s] float32, momentum.
          g: [n, *s] float32, the gradient.
          blocks: theirs, with the factors and the second moment of the step before.
          step: number of this step, from 1.
          options: of the optimizer.
        """

    @abc.abstractmethod
    def takes(self, exponent: jax.Array, group: Any) -> jax.Array:
        """How many powers of two acting takes from a momentum of the order of 2^exponent."""

    def solve(self, stack: jax.Array, old: jax.Array | None, sizes: jax.Array, group: Any, options: Any) -> RootResult:
        """Return factors for a batch of statistics, and which of them are accepted; on a device.

        Args:
          stack: [n, r, r] float32, bias-corrected; zero where nothing is due.
          old: [n, r, r] float32, the factors that are there, zero before the first; None unless `warm`.
          sizes: [n] int32, real lengths.
          group: p, ridge and cut of the blocks.
          options: of the optimizer.
        """
        raise AssertionError(f"{self.name} keeps no statistics")

    def solve_on_host(self, a: np.ndarray, group: Any, options: Any) -> tuple[RootResult, int]:
        """(result, number of retries) for the statistics of one side, float64.

        Args:
          a: [r, r], without padding.
          group: p, ridge and cut of the block.
          options: of the optimizer.
        """
        raise AssertionError(f"{self.name} keeps no statistics")

    def shift(self, exponent: Any, group: Any) -> Any:
        """Log2 of what a factor of statistics divided by 2^(power x exponent) is to be multiplied by."""
        del group
        return 0.0 * exponent

    def carried(
        self, second_moment: jax.Array, old: Sequence[jax.Array], new: Sequence[jax.Array], sides: Sequence[int]
    ) -> jax.Array:
        """The second moment [n, *s] of the same blocks when new factors take the place of old ones."""
        raise AssertionError(f"{self.name} keeps no second moment")


def multiplied(x: jax.Array, factors: Sequence[jax.Array], sides: Sequence[int]) -> jax.Array:
    """Blocks [n, *s] with each of some sides multiplied by its matrix [n, r, r] from the left."""
    for side, factor in zip(sides, factors, strict=True):
        product = jax.lax.dot_general(
            factor, x, (((2,), (side + 1,)), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST
        )
        x = jax.numpy.moveaxis(product, 1, side + 1)
    return x
