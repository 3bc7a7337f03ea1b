"""Inverse p-th roots of stacks of positive semidefinite matrices, with residuals.

Results do not depend on the scale of a matrix: solvers get it divided by a power of two, and every tolerance, ridge and
cut is relative to its largest eigenvalue `lmax`.

Two regularisers define the result X for a matrix A = V diag(w) V':
  ridge rho: X = V diag((max(w, 0) + rho lmax)^(-1/p)) V'
  cut tau:   X = V diag(w^(-1/p) where w > tau lmax, else 0) V'
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import lapack, newton
from .lapack import RootResult
from .scaling import exponent_of, power_of_two

__all__ = ["RootResult", "inverse_pth_root"]


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


class _Prepared(NamedTuple):
    """Matrices scaled for a solver.

    Attributes:
      a: [n, r, r] symmetric, largest entry in [1/2, 1); zero in the padding and for matrices that are not finite.
      padding: [n, r, r] the largest entry of `a` on the diagonal of the padding, so that the padding has neither the
        largest nor the smallest eigenvalue; the identity for a zero matrix.
      real: [n, r, r] bool, whether an entry is outside the padding.
      scale_log2: [n] int, binary scale: the given matrix is 2^scale_log2 a.
      finite: [n] bool, whether all entries of the matrix are finite.
    """

    a: jax.Array
    padding: jax.Array
    real: jax.Array
    scale_log2: jax.Array
    finite: jax.Array


def _prepare(stack_nrr, sizes_n) -> _Prepared:
    a = jnp.asarray(stack_nrr, jnp.float32)
    n, r, _ = a.shape
    real = jnp.ones((n, r), bool) if sizes_n is None else jnp.arange(r) < sizes_n[:, None]
    real = real[:, :, None] & real[:, None, :]
    # The maximum propagates NaN.
    largest = jnp.max(jnp.where(real, jnp.abs(a), 0), axis=(-2, -1))
    finite = jnp.isfinite(largest)
    largest = jnp.where(finite, largest, 0)
    scale_log2 = exponent_of(largest)
    largest = largest * power_of_two(-scale_log2)
    a = jnp.where(real & finite[:, None, None], a * power_of_two(-scale_log2)[:, None, None], 0)
    zero = largest == 0
    padding = jnp.where(zero, 1, largest)[:, None, None] * jnp.eye(r, dtype=a.dtype)
    padding = jnp.where(real & ~zero[:, None, None], 0, padding)
    return _Prepared(newton.symmetric(a), padding, real, scale_log2, finite)


def _finish(given: _Prepared, p: int, x_nrr, residual_n, largest_n, condition_n) -> RootResult:
    """Undo the scaling, and set the results of matrices that are zero or not finite."""
    x = x_nrr * power_of_two(-given.scale_log2 / p)[:, None, None]
    trace = jnp.trace(given.a, axis1=-2, axis2=-1)
    nonzero = (largest_n > 0) & (trace > 0)
    return RootResult(
        root=jnp.where(given.real & nonzero[:, None, None], x, 0),
        residual=jnp.where(given.finite, jnp.where(nonzero, residual_n, 1), jnp.nan),
        largest=jnp.where(nonzero, largest_n, 0) * power_of_two(given.scale_log2),
        condition=jnp.where(nonzero, condition_n, 1),
        effective_rank=jnp.where(nonzero, trace / jnp.where(nonzero, largest_n, 1), 0),
    )


def _newton(stack_nrr, p: int, ridge: float, cut: float, sizes_n) -> RootResult:
    del cut
    given = _prepare(stack_nrr, sizes_n)
    largest = newton.largest_eigenvalue(given.a)
    # Replace a zero matrix by the identity, so that the iteration converges.
    bound = jnp.where(largest > 0, largest, 1)[:, None, None]
    identity = jnp.eye(given.a.shape[-1], dtype=given.a.dtype)
    a = jnp.where(given.real & (largest > 0)[:, None, None], given.a / bound, identity)
    x, residual, condition = newton.inverse_root(a, p, ridge)
    return _finish(given, p, x * bound ** (-1 / p), residual, largest, condition)


def _eigh(stack_nrr, p: int, ridge: float, cut: float, sizes_n) -> RootResult:
    """Compute roots by one batched eigendecomposition, corrected by perturbation theory.

    LAPACK's eigenvalues have errors of several ulp of the largest, a few per cent of the smallest at condition 1e6. In
    LAPACK's basis V, B = V' A V = diag(w) + G with a small G, and with divided differences f[.,.] (Daleckii and Krein)
      f(B)_ij = f(w_i) for i = j, f[w_i, w_j] G_ij otherwise, plus sum_k f[w_i, w_k, w_j] G_ik G_kj.
    The second-order term matters for the smallest eigenvalues, where G may be a tenth of w. It is computed by a formula
    that is exact for equal eigenvalues.
    """
    given = _prepare(stack_nrr, sizes_n)
    a = given.a + given.padding
    # One call for the whole batch: two independent LAPACK calls can deadlock a CPU.
    _, v = jnp.linalg.eigh(a)
    transposed = jnp.swapaxes(v, -2, -1)
    b = newton.symmetric(newton.matmul(transposed, newton.accurate_matmul(a, v)))
    w = jnp.diagonal(b, axis1=-2, axis2=-1)
    largest = jnp.max(w, axis=-1)
    w_shifted, root_w, above = lapack.regularised(w, largest[:, None], p, ridge, cut, jnp)

    both, one = above[:, :, None] & above[:, None, :], above[:, :, None] ^ above[:, None, :]
    shifted_i, shifted_j = w_shifted[:, :, None], w_shifted[:, None, :]
    mean, gap = (shifted_i + shifted_j) / 2, w[:, :, None] - w[:, None, :]
    near = both & (jnp.abs(gap) <= 0.02 * mean)
    quotient = (root_w[:, :, None] - root_w[:, None, :]) / jnp.where(near | (gap == 0), 1, gap)
    slope = jnp.where(near, -(jnp.where(near, mean, 1) ** (-1 / p - 1)) / p, quotient)
    g = jnp.where(jnp.eye(a.shape[-1], dtype=bool), 0, b)
    # Across the cut the quotient is unbounded, and valid only for well separated eigenvalues.
    first = jnp.where(both | (one & ((ridge > 0) | (jnp.abs(gap) > mean))), slope, 0) * g
    inverse = jnp.where(above, 1 / jnp.where(above, w_shifted, 1), 0)
    outer = inverse ** ((1 / p + 1) / 2)
    second = (p + 1) / (2 * p * p) * outer[:, :, None] * newton.matmul(g * inverse[:, None, :], g) * outer[:, None, :]
    f = newton.symmetric(first + second) + root_w[:, :, None] * jnp.eye(a.shape[-1], dtype=a.dtype)
    x = newton.symmetric(newton.matmul(newton.matmul(v, f), transposed))

    if cut:
        unit = newton.matmul(v * above[:, None, :], transposed)
    else:
        unit = jnp.zeros_like(a) + jnp.eye(a.shape[-1], dtype=a.dtype)
        a = a + ridge * largest[:, None, None] * unit - newton.matmul(v * jnp.minimum(w, 0)[:, None, :], transposed)
    low, high = newton.halves(x, p)
    residual = newton.residual(low, high, a, unit)
    if not ridge and not cut:
        residual = jnp.where(jnp.all(above, axis=-1), residual, jnp.maximum(residual, 1))
    smallest = jnp.min(jnp.where(root_w > 0, w_shifted, jnp.inf), axis=-1)
    return _finish(given, p, x, residual, largest, jnp.max(w_shifted, axis=-1) / smallest)


def _host(stack_nrr, p: int, ridge: float, cut: float, sizes_n) -> RootResult:
    """Compute roots by float64 LAPACK on the host, one matrix at a time."""
    stack = np.asarray(stack_nrr)
    n, r, _ = stack.shape
    sizes = np.full(n, r) if sizes_n is None else np.asarray(sizes_n)
    root, numbers = np.zeros((n, r, r), np.float32), np.zeros((n, 4), np.float32)
    for i, size in enumerate(sizes):
        x, *numbers[i], _ = lapack.inverse_root(stack[i, :size, :size], p, ridge, cut)
        root[i, :size, :size] = x
    return RootResult(jnp.asarray(root), *jnp.asarray(numbers.T))


SOLVERS: dict[str, Callable[..., RootResult]] = {"newton": _newton, "eigh": _eigh, "host": _host}
