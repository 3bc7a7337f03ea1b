"""Inverse p-th roots in float64 by LAPACK on the host, one matrix at a time."""

import functools

import jax.numpy as jnp
import numpy as np

from .blas import eigh, product
from .roots import RootResult


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
    w, v = eigh(a)
    if size == 0 or w[-1] <= 0:
        return RootResult(np.zeros((size, size)), 1.0, 0.0, 1.0, 0.0)
    shifted, root_w, above = regularised(w, w[-1], p, ridge, cut, np)
    x = product(v * root_w, v.T)
    if cut:
        unit = product(v * above, v.T)
    else:
        unit = np.eye(size)
        a = a + ridge * w[-1] * unit - product(v * np.minimum(w, 0), v.T)
    found = functools.reduce(product, (*[x] * (p // 2), a, *[x] * ((p + 1) // 2)))
    residual = float(np.max(np.abs(found - unit)))
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


def host(stack_nrr, p: int, ridge: float, cut: float, sizes_n) -> RootResult:
    """Compute roots by float64 LAPACK on the host, one matrix at a time."""
    stack = np.asarray(stack_nrr)
    n, r, _ = stack.shape
    sizes = np.full(n, r) if sizes_n is None else np.asarray(sizes_n)
    root, numbers = np.zeros((n, r, r), np.float32), np.zeros((n, 4), np.float32)
    for i, size in enumerate(sizes):
        x, *numbers[i], _ = inverse_root(stack[i, :size, :size], p, ridge, cut)
        root[i, :size, :size] = x
    return RootResult(jnp.asarray(root), *jnp.asarray(numbers.T))
