"""Inverse p-th roots of stacks of positive semidefinite matrices, with residuals.

Two regularisers, relative to the largest eigenvalue `lmax`, define the result X for a matrix A = V diag(w) V':
  ridge rho: X = V diag((max(w, 0) + rho lmax)^(-1/p)) V'
  cut tau:   X = V diag(w^(-1/p) where w > tau lmax, else 0) V'
"""

import jax
import numpy as np

from .linalg.eigh import eigh
from .linalg.lapack import host
from .linalg.polynomials import newton
from .linalg.roots import RootResult

__all__ = ["RootResult", "inverse_pth_root"]

SOLVERS = {"newton": newton, "eigh": eigh, "host": host}


def inverse_pth_root(
    stack_nrr: jax.Array | np.ndarray,
    p: int,
    *,
    solver: str = "newton",
    ridge: float = 0.0,
    cut: float = 0.0,
    sizes_n: jax.Array | None = None,
) -> RootResult:
    """Return A^(-1/p) for each matrix A of a stack.

    Args:
      stack_nrr: [n, r, r] symmetric, positive semidefinite up to rounding; matrix and root must be within float32.
      p: order of the root, a positive integer.
      solver: "newton" (coupled Newton, matmuls only), "eigh" (on device) or "host" (float64 LAPACK, outside jit).
      ridge: relative ridge rho >= 0.
      cut: relative cut tau >= 0, for "eigh" and "host" only; at most one of ridge and cut is positive.
      sizes_n: [n] int, size of each matrix without padding; the root is zero in the padding.

    Raises:
      ValueError: the solver is unknown, p < 1, a regulariser is negative, both are set, or "newton" has a cut.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r}: must be one of {', '.join(SOLVERS)}.")
    if int(p) != p or p < 1:
        raise ValueError(f"p={p}: must be a positive integer.")
    if min(ridge, cut) < 0 or (ridge > 0 and cut > 0):
        raise ValueError(f"ridge={ridge} and cut={cut}: must not be negative, and only one may be positive.")
    if solver == "newton" and cut:
        raise ValueError(f"cut={cut}: needs solver 'eigh' or 'host'. Use a ridge with solver 'newton'.")
    return SOLVERS[solver](stack_nrr, int(p), ridge, cut, sizes_n)
