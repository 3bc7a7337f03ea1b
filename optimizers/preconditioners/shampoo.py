"""Shampoo: each side multiplied by an inverse root of its statistics (arXiv 1802.09568, 2002.09018)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..linalg import lapack
from ..linalg.roots import RootResult, inverse_pth_root
from .base import Blocks, Preconditioner, multiplied

# How far an entry of an accepted root may exceed (regulariser x largest eigenvalue)^(-1/p).
NORM_MARGIN = 1.05
# A failed solve on the host is tried again with the regulariser this many times as large, and then as many times that.
RETRIES = (10.0, 100.0)
SMALLEST_RETRY = 1e-7


class Shampoo(Preconditioner):
    """L^(-1/p) M R^(-1/p) for a matrix, of L = sum of G G' and R = sum of G' G.

    Args:
      side: which sides it takes where a treatment does not say.
    """

    name = "shampoo"
    has_exponent = True

    def __init__(self, side: str = "both"):
        self.side = side

    def order(self, exponent: float | None, sides: int) -> int:
        """One over the exponent; where there is none, twice the number of sides."""
        if exponent == 0:
            return 0
        if exponent is None:
            exponent = 1 / (2 * sides)
        p = max(1, round(1 / exponent)) if exponent > 1e-9 else 1  # the inverse of less may be infinite
        if not abs(p * exponent - 1) <= 1e-5:
            raise ValueError(
                f"exponent {exponent} is neither 0 nor 1/p for a whole p; the nearest is 1/{p} = {1 / p:.6g}"
            )
        return p

    def uses_lapack(self, group: Any, options: Any) -> bool:
        """One of the solvers does."""
        del group
        return options.solver == "eigh"

    def title(self, p: int) -> str:
        """As in "p4"."""
        return f"p{p}" if p else "momentum"

    def act(
        self, m: jax.Array, g: jax.Array, blocks: Blocks, step: jax.Array, options: Any
    ) -> tuple[jax.Array, jax.Array | None]:
        """Each preconditioned side multiplied by its root."""
        del g, step, options
        return multiplied(m, blocks.factors, blocks.sides), None

    def takes(self, exponent: jax.Array, group: Any) -> jax.Array:
        """Two powers for each side, shared by the order of the roots."""
        return 2 * len(group.sides) * exponent // max(group.p, 1)

    def solve(self, stack: jax.Array, old: jax.Array | None, sizes: jax.Array, group: Any, options: Any) -> RootResult:
        """Inverse p-th roots; accepted if finite, of a residual and of entries within bounds."""
        del old
        p, ridge, cut = group.p, group.ridge, group.cut
        result = inverse_pth_root(stack, p, solver=options.solver, ridge=ridge, cut=cut, sizes_n=sizes)
        accepted = (result.residual <= options.residual_bound) & (result.largest > 0)
        accepted &= jnp.all(jnp.isfinite(result.root), axis=(-2, -1))
        if ridge or cut:
            bound = NORM_MARGIN * ((ridge or cut) * result.largest) ** (-1 / p)
            accepted &= jnp.max(jnp.abs(result.root), axis=(-2, -1)) <= bound
        return result._replace(accepted=accepted)

    def solve_on_host(self, a: np.ndarray, group: Any, options: Any) -> tuple[RootResult, int]:
        """Solve in float64; retry a failed solve with a larger regulariser."""
        refused = lapack.refused(a)
        if refused.largest <= 0:
            return refused, 0
        ridge, cut = group.ridge, group.cut
        regulariser = ridge or cut
        for tried, factor in enumerate((1.0, *RETRIES)):
            if factor > 1:
                regulariser = factor * max(ridge, cut, SMALLEST_RETRY)
            try:
                found = lapack.inverse_root(a, group.p, *((0.0, regulariser) if cut else (regulariser, 0.0)))
            except np.linalg.LinAlgError:
                continue
            bound = NORM_MARGIN * (regulariser * found.largest) ** (-1 / group.p) if regulariser else np.inf
            if found.residual <= options.residual_bound and np.max(np.abs(found.root)) <= bound:
                return found._replace(accepted=True), tried
        return refused, len(RETRIES)

    def shift(self, exponent: Any, group: Any) -> Any:
        """A = 2^(power x exponent) x statistics, hence 2^(-power x exponent / p) x their root."""
        return -self.power(len(group.sides)) * exponent / group.p
