"""Inverse p-th roots in float64 by LAPACK on the host, one matrix at a time.

`numpy.linalg.eigh` releases the interpreter lock, so threads solve side by side; SciPy's does not.
"""

from typing import NamedTuple

import numpy as np


class HostRoot(NamedTuple):
    """A root and how far it can be trusted; the numbers are those of `roots.RootResult`.

    Attributes:
      root: [r, r] float64, symmetric.
      residual, largest, condition, effective_rank: as in `roots.RootResult`.
    """

    root: np.ndarray
    residual: float
    largest: float
    condition: float
    effective_rank: float


def inverse_root(a_rr: np.ndarray, p: int, ridge: float, cut: float) -> HostRoot:
    """A^(-1/p) of one symmetric matrix, with a ridge or a cut relative to its largest eigenvalue.

    Args:
      a_rr: [r, r], of any floating type and scale; without padding.
      p: the root's order.
      ridge: relative, as in `roots.inverse_pth_root`.
      cut: relative, as there.

    Raises:
      numpy.linalg.LinAlgError: LAPACK did not converge.
    """
    a = np.asarray(a_rr, np.float64)
    size = len(a)
    if not np.all(np.isfinite(a)):
        return HostRoot(np.zeros((size, size)), np.nan, 0.0, 1.0, 0.0)
    a = (a + a.T) / 2
    trace = np.trace(a)
    w, v = np.linalg.eigh(a)
    if size == 0 or w[-1] <= 0:
        return HostRoot(np.zeros((size, size)), 1.0, 0.0, 1.0, 0.0)
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
    return HostRoot(x, residual, float(w[-1]), float(condition), float(trace / w[-1]))


def regularised(w, lmax, p: int, ridge: float, cut: float, xp):
    """Eigenvalues with their ridge, those of the root, and which are above zero or the cut; `xp` is NumPy or JAX."""
    above = w > cut * lmax
    shifted = xp.where(above, w, 0) + ridge * lmax
    kept = shifted > 0
    return shifted, xp.where(kept, xp.where(kept, shifted, 1) ** (-1 / p), 0), above
