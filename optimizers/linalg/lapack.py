"""Inverse p-th roots in float64 by LAPACK on the host, one matrix at a time.

`numpy.linalg.eigh` releases the GIL, so that threads solve in parallel; SciPy's does not.
"""

from typing import Any, NamedTuple

import numpy as np


class RootResult(NamedTuple):
    """Roots with measures of their accuracy, for one matrix or a stack [n]; `root` may be a tuple with one per side.

    The root of a zero matrix is zero, with residual 1. The root of a matrix with a NaN or an infinity is zero, with
    residual NaN.

    Attributes:
      root: [n, r, r] symmetric; float32 from a device, float64 from the host.
      residual: [n] max |X^(p/2) A X^(p/2) - P| of the root X, with A the matrix plus ridge and P the identity (with a
        cut, the projector on the kept eigenvectors); an odd p is split unevenly. At least 1 for a singular matrix
        without regulariser.
      largest: [n] largest eigenvalue of the given matrix.
      condition: [n] estimated condition number of A on the range of P; 1 for a zero matrix.
      effective_rank: [n] trace / largest eigenvalue of the given matrix; 0 for a zero matrix.
      accepted: [n] bool, whether a preconditioner may use the root; None if undecided.
    """

    root: Any
    residual: Any
    largest: Any
    condition: Any
    effective_rank: Any
    accepted: Any = None


def inverse_root(a_rr: np.ndarray, p: int, ridge: float, cut: float) -> RootResult:
    """Return A^(-1/p) of one symmetric matrix, with a ridge or a cut relative to its largest eigenvalue.

    Args:
      a_rr: [r, r] of any floating type and scale, without padding.
      p: order of the root.
      ridge: relative ridge, as in `roots.inverse_pth_root`.
      cut: relative cut, as in `roots.inverse_pth_root`.

    Raises:
      numpy.linalg.LinAlgError: LAPACK did not converge.
    """
    a = np.asarray(a_rr, np.float64)
    size = len(a)
    if not np.all(np.isfinite(a)):
        return RootResult(np.zeros((size, size)), np.nan, 0.0, 1.0, 0.0)
    a = (a + a.T) / 2
    trace = np.trace(a)
    w, v = np.linalg.eigh(a)
    if size == 0 or w[-1] <= 0:
        return RootResult(np.zeros((size, size)), 1.0, 0.0, 1.0, 0.0)
    shifted, root_w, above = regularised(w, w[-1], p, ridge, cut, np)
    x = (v * root_w) @ v.T
    if cut:
        unit = (v * above) @ v.T
    else:
        unit = np.eye(size)
        a = a + ridge * w[-1] * unit - (v * np.minimum(w, 0)) @ v.T
    low, high = np.linalg.matrix_power(x, p // 2), np.linalg.matrix_power(x, (p + 1) // 2)
    residual = float(np.max(np.abs(low @ a @ high - unit)))
    if not ridge and not cut and not np.all(above):
        residual = max(residual, 1.0)
    condition = shifted[-1] / np.min(shifted[root_w > 0])
    return RootResult(x, residual, float(w[-1]), float(condition), float(trace / w[-1]))


def refused(a_rr: np.ndarray) -> RootResult:
    """Return the result for a matrix without a usable root; `largest` is 0 if it is zero or not finite."""
    trace = float(np.trace(a_rr)) if np.all(np.isfinite(a_rr)) else 0.0
    return RootResult(np.zeros_like(a_rr), np.nan, max(trace, 0.0), 1.0, 0.0, accepted=False)


def regularised(w, lmax, p: int, ridge: float, cut: float, xp):
    """Return (eigenvalues plus ridge, eigenvalues of the root, whether each is above the cut); `xp` is NumPy or JAX."""
    above = w > cut * lmax
    shifted = xp.where(above, w, 0) + ridge * lmax
    kept = shifted > 0
    return shifted, xp.where(kept, xp.where(kept, shifted, 1) ** (-1 / p), 0), above
