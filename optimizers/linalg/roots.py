"""Inverse p-th roots of stacks of positive semidefinite matrices, each with the residual it was checked by.

All solvers are scale-free: matrices are divided by a power of two before any of them sees them, and every
tolerance, ridge and cut is relative to the largest eigenvalue `lmax` of the matrix.

Two regularisers, each part of the definition of the answer X for a matrix A = V diag(w) V':
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
from .scaling import power_of_two

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
    """A^(-1/p) for each matrix A of a stack.

    Args:
      stack_nrr: [n, r, r] symmetric, positive semidefinite up to rounding (of bfloat16, say), of any scale for which
        matrix and root are within float32.
      p: positive integer; the root's order.
      solver: "newton" (coupled Newton, matmuls only), "eigh" (on device) or "host" (float64 LAPACK, outside jit).
      ridge: relative ridge rho >= 0.
      cut: relative cut tau >= 0, for "eigh" and "host"; at most one of the two is positive.
      sizes_n: [n] how many leading rows and columns of each matrix are real; the rest is padding, and zero in the root.

    Raises:
      ValueError: an unknown solver, p < 1, a negative regulariser, both at once, or a cut for "newton".
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; choose one of {', '.join(SOLVERS)}")
    if int(p) != p or p < 1:
        raise ValueError(f"p is {p}; it must be a positive integer")
    if min(ridge, cut) < 0 or (ridge > 0 and cut > 0):
        raise ValueError(f"ridge {ridge} and cut {cut} must not be negative, and only one of them may be positive")
    if solver == "newton" and cut:
        raise ValueError(f"cut={cut} is for solvers 'eigh' and 'host'; solver 'newton' takes a ridge")
    return SOLVERS[solver](stack_nrr, int(p), ridge, cut, sizes_n)


class _Prepared(NamedTuple):
    """Matrices scaled for a solver.

    Attributes:
      a: [n, r, r] symmetric, with its largest entry in [1/2, 1), zero in the padding and where not finite.
      padding: [n, r, r] that largest entry on the diagonal of the padding, so that none of its eigenvalues is the
        largest or the smallest. It is 1 wherever the matrix is zero.
      real: [n, r, r] whether an entry is outside the padding.
      scale_log2: [n] the matrix as given is 2^scale_log2 times `a`.
      finite: [n] whether all entries of the matrix are.
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
    # A NaN is the maximum of anything.
    largest = jnp.max(jnp.where(real, jnp.abs(a), 0), axis=(-2, -1))
    finite = jnp.isfinite(largest)
    largest, scale_log2 = jnp.frexp(jnp.where(finite, largest, 0))
    a = jnp.where(real & finite[:, None, None], a * power_of_two(-scale_log2)[:, None, None], 0)
    zero = largest == 0
    padding = jnp.where(zero, 1, largest)[:, None, None] * jnp.eye(r, dtype=a.dtype)
    padding = jnp.where(real & ~zero[:, None, None], 0, padding)
    return _Prepared(newton.symmetric(a), padding, real, scale_log2, finite)


def _finish(given: _Prepared, p: int, x_nrr, residual_n, largest_n, condition_n) -> RootResult:
    """Undo the scaling; answer for matrices that are zero or not finite."""
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
    # The identity stands for a matrix that is zero: the iteration has nothing to invert there.
    bound = jnp.where(largest > 0, largest, 1)[:, None, None]
    identity = jnp.eye(given.a.shape[-1], dtype=given.a.dtype)
    a = jnp.where(given.real & (largest > 0)[:, None, None], given.a / bound, identity)
    x, residual, condition = newton.inverse_root(a, p, ridge)
    return _finish(given, p, x * bound ** (-1 / p), residual, largest, condition)


def _eigh(stack_nrr, p: int, ridge: float, cut: float, sizes_n) -> RootResult:
    """One batched eigendecomposition, improved by perturbation theory.

    LAPACK's eigenvalues are wrong by several units of rounding of the largest, which for the smallest is a few per
    cent at condition 1e6. In the basis V it finds, B = V' A V = diag(w) + G with a small G, and
      f(B)_ij = f(w_i) on the diagonal, f[w_i, w_j] G_ij off it (Daleckii and Krein), plus second order
    where f[.,.] is the divided difference. Of the second order, sum_k f[w_i, w_k, w_j] G_ik G_kj, what is right for
    equal eigenvalues and right up to a factor near 1 for others: there G may be a tenth of w.
    """
    given = _prepare(stack_nrr, sizes_n)
    a = given.a + given.padding
    # One call for the whole batch: two LAPACK calls that do not depend on each other can deadlock a CPU.
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
    # Across the cut the quotient has no bound, and means something only for eigenvalues that are well apart.
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
    """Float64 LAPACK on the host, one matrix at a time."""
    stack = np.asarray(stack_nrr)
    n, r, _ = stack.shape
    sizes = np.full(n, r) if sizes_n is None else np.asarray(sizes_n)
    root, numbers = np.zeros((n, r, r), np.float32), np.zeros((n, 4), np.float32)
    for i, size in enumerate(sizes):
        x, *numbers[i], _ = lapack.inverse_root(stack[i, :size, :size], p, ridge, cut)
        root[i, :size, :size] = x
    return RootResult(jnp.asarray(root), *jnp.asarray(numbers.T))


SOLVERS: dict[str, Callable[..., RootResult]] = {"newton": _newton, "eigh": _eigh, "host": _host}
