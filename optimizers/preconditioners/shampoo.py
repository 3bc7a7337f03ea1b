"""Shampoo: each side multiplied by an inverse root of its statistics (arXiv 1802.09568, 2002.09018)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..linalg import lapack
from ..linalg.eigh import eigh
from ..linalg.polynomials import newton
from ..linalg.roots import RootResult
from .base import Blocks, Preconditioner, PreconditionerState, multiplied

# Solvers on a device.
SOLVERS = {"newton": newton, "eigh": eigh}
# An accepted root has no entry above NORM_MARGIN x (regulariser x largest eigenvalue)^(-1/p).
NORM_MARGIN = 1.05
# Factors of the regulariser for retries of a failed solve on the host, and the smallest regulariser of a retry.
RETRIES = (10.0, 100.0)
SMALLEST_RETRY = 1e-7


class Shampoo(Preconditioner):
    """The direction L^(-1/p) M R^(-1/p) of a matrix, with L = sum of G G' and R = sum of G' G.

    Args:
      side: default for a treatment's `side`.
    """

    name = "shampoo"

    def __init__(self, side: str = "both"):
        self.side = side

    def act(
        self, m: jax.Array, g: jax.Array, state: PreconditionerState, age: jax.Array, blocks: Blocks
    ) -> tuple[jax.Array, jax.Array | None]:
        """Multiply each preconditioned side by its root."""
        del g, age
        return multiplied(m, state.roots, blocks.bucket.sides, blocks.bucket.precision.action), None

    def solve(self, stack: jax.Array, old: jax.Array | None, blocks: Blocks) -> RootResult:
        """Return inverse p-th roots; a root is accepted if its residual and its entries are within bounds."""
        del old
        bucket, options = blocks.bucket, blocks.options
        p, ridge, cut = bucket.p, bucket.ridge, bucket.cut
        result = SOLVERS[options.solver](stack, p, ridge, cut, blocks.sizes, bucket.precision.solver)
        accepted = (result.residual <= options.residual_bound) & (result.largest > 0)
        bound = jnp.float32(jnp.finfo(jnp.float32).max)
        if ridge or cut:
            bound = NORM_MARGIN * ((ridge or cut) * result.largest) ** (-1 / p)
        # The comparison is False for a NaN.
        accepted &= jnp.max(jnp.abs(result.root), axis=(-2, -1)) <= bound
        return result._replace(accepted=accepted)

    def solve_on_host(self, a: np.ndarray, bucket: Any, options: Any) -> tuple[RootResult, int]:
        """Solve in float64; retry a failed solve with a larger regulariser."""
        refused = lapack.refused(a)
        if refused.largest <= 0:
            return refused, 0
        ridge, cut = bucket.ridge, bucket.cut
        regulariser = ridge or cut
        for tried, factor in enumerate((1.0, *RETRIES)):
            if factor > 1:
                regulariser = factor * max(ridge, cut, SMALLEST_RETRY)
            try:
                found = lapack.inverse_root(a, bucket.p, *((0.0, regulariser) if cut else (regulariser, 0.0)))
            except np.linalg.LinAlgError:
                continue
            bound = NORM_MARGIN * (regulariser * found.largest) ** (-1 / bucket.p) if regulariser else np.inf
            if found.residual <= options.residual_bound and np.max(np.abs(found.root)) <= bound:
                return found._replace(accepted=True), tried
        return refused, len(RETRIES)
