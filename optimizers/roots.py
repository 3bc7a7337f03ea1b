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
from jax import lax

HIGHEST = lax.Precision.HIGHEST

# Newton multiplies the smallest eigenvalue by at least ((p + 1) / p)^p >= 2 in each iteration: 40 cover float32.
MAX_ITERATIONS = 40
TOLERANCE = 1e-6


class RootResult(NamedTuple):
    """Roots of a stack and how far they can be trusted.

    Attributes:
      root: [n, r, r] float32, symmetric; zero for a matrix that is zero.
      residual: [n] float32, max |X^p A - P| recomputed from the root, where A is the matrix with its ridge and P the
        identity (the projector on the kept eigenvectors with a cut); 1 for a matrix that is zero.
      largest: [n] float32, the largest eigenvalue of the matrix as given.
    """

    root: jax.Array
    residual: jax.Array
    largest: jax.Array


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
      stack_nrr: [n, r, r] symmetric positive semidefinite up to rounding, any scale within float32.
      p: positive integer; the root's order.
      solver: "newton" (coupled Newton, matmuls only), "eigh" (on device) or "host" (float64 LAPACK, outside jit).
      ridge: relative ridge rho >= 0.
      cut: relative cut tau >= 0; at most one of the two is positive.
      sizes_n: [n] how many leading rows and columns of each matrix are real; the rest is padding, and zero in the root.

    Raises:
      ValueError: an unknown solver, p < 1, a negative regulariser, or both at once.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; choose one of {', '.join(SOLVERS)}")
    if int(p) != p or p < 1:
        raise ValueError(f"p is {p}; it must be a positive integer")
    if min(ridge, cut) < 0 or (ridge > 0 and cut > 0):
        raise ValueError(f"ridge {ridge} and cut {cut} must not be negative, and only one of them may be positive")
    return SOLVERS[solver](stack_nrr, int(p), ridge, cut, sizes_n)


def _power_of_two(x_n: jax.Array) -> jax.Array:
    """Exponent e of each positive x with 2^(e-1) <= x < 2^e; 0 for zero."""
    return jnp.frexp(x_n)[1]


def _largest_eigenvalue(a_nrr: jax.Array) -> jax.Array:
    """Largest eigenvalue of matrices scaled to max |a| in [1/2, 1), from power iterations on A^16.

    The start is the column of A^16 with the largest diagonal entry, whose overlap with the leading eigenvector is at
    least 1/r; 144 iterations in effect, so that the Rayleigh quotient is low by at most ln(r) / 288.
    """
    frobenius = jnp.sqrt(jnp.sum(a_nrr * a_nrr, axis=(-2, -1), keepdims=True))
    power = a_nrr / jnp.where(frobenius > 0, frobenius, 1)
    power = lax.fori_loop(0, 4, lambda _, x: jnp.matmul(x, x, precision=HIGHEST), power)
    start = jnp.argmax(jnp.diagonal(power, axis1=-2, axis2=-1), axis=-1)
    v = jnp.take_along_axis(power, start[:, None, None], axis=-1)

    def normalised(v: jax.Array) -> jax.Array:
        norm = jnp.sqrt(jnp.sum(v * v, axis=(-2, -1), keepdims=True))
        return v / jnp.where(norm > 0, norm, 1)

    v = lax.fori_loop(0, 8, lambda _, v: normalised(jnp.matmul(power, v, precision=HIGHEST)), normalised(v))
    return jnp.sum(v * jnp.matmul(a_nrr, v, precision=HIGHEST), axis=(-2, -1))


def _matrix_power(x_nrr: jax.Array, p: int) -> jax.Array:
    """X^p by repeated squaring with static p."""
    result = None
    while p:
        if p & 1:
            result = x_nrr if result is None else jnp.matmul(result, x_nrr, precision=HIGHEST)
        p >>= 1
        if p:
            x_nrr = jnp.matmul(x_nrr, x_nrr, precision=HIGHEST)
    assert result is not None
    return result


def _prepare(stack_nrr: jax.Array, sizes_n: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Symmetrise, scale to max |a| in [1/2, 1) and clear the padding: scaled stack, exponents [n], mask [n, r]."""
    a = jnp.asarray(stack_nrr, jnp.float32)
    r = a.shape[-1]
    real = jnp.ones((a.shape[0], r), bool) if sizes_n is None else jnp.arange(r) < sizes_n[:, None]
    exponent = _power_of_two(jnp.max(jnp.abs(a), axis=(-2, -1), initial=0.0))
    # Two halves: 2^-exponent alone overflows for the smallest float32 numbers.
    for part in (exponent // 2, exponent - exponent // 2):
        a = a * jnp.ldexp(jnp.float32(1), -part)[:, None, None]
    a = (a + jnp.swapaxes(a, -2, -1)) / 2
    return jnp.where(real[:, :, None] & real[:, None, :], a, 0), exponent, real


def _finish(x_nrr: jax.Array, residual_n: jax.Array, largest_n: jax.Array, exponent_n: jax.Array, p: int) -> RootResult:
    """Undo the scaling; a zero matrix has the zero root and residual 1."""
    nonzero = largest_n > 0
    scale = jnp.exp2(-exponent_n / p)
    root = jnp.where(nonzero[:, None, None], x_nrr * scale[:, None, None], 0)
    return RootResult(root, jnp.where(nonzero, residual_n, 1.0), jnp.ldexp(largest_n, exponent_n))


def _newton(stack_nrr, p: int, ridge: float, cut: float, sizes_n) -> RootResult:
    """Coupled Newton iteration (Guo and Higham 2006; Anil et al. 2020, appendix).

    M_0 = A z, X_0 = z^(1/p) I with z = (p + 1) / (2 lmax); T = ((p + 1) I - M) / p; X <- X T; M <- T^p M.
    A cut tau is the soft pseudo-inverse: with a ridge of tau / 16, X (I - ridge X^p)^4 leaves directions well above
    the ridge alone and suppresses those below it, matmuls only.
    """
    a, exponent, real = _prepare(stack_nrr, sizes_n)
    n, r, _ = a.shape
    identity = jnp.eye(r, dtype=a.dtype)
    largest = jnp.maximum(_largest_eigenvalue(a), 0)
    bound = jnp.where(largest > 0, largest, 1)[:, None, None]
    rho = ridge if cut == 0 else cut / 16
    # Padding takes the largest eigenvalue, so that it converges at once and cannot change the others.
    a = a / bound + identity * jnp.where(real, rho, 1.0)[:, None, :]
    start = (p + 1) / (2 * (1 + rho))

    def error(m: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(m - identity), axis=(-2, -1), initial=0.0)

    def active(state) -> jax.Array:
        iteration, _, _, _, running = state
        return jnp.any(running) & (iteration < MAX_ITERATIONS)

    def iterate(state):
        iteration, x, m, previous, running = state
        t = ((p + 1) * identity - m) / p
        next_x = jnp.matmul(x, t, precision=HIGHEST)
        next_m = jnp.matmul(_matrix_power(t, p), m, precision=HIGHEST)
        next_m = (next_m + jnp.swapaxes(next_m, -2, -1)) / 2
        now = error(next_m)
        # Far from the solution an entry may grow while the eigenvalues approach 1, which keep it below p + 1; close to
        # the solution a rise is rounding, and the old value stays.
        better = running & ((now < previous) | ((now < p + 1) & (previous > 0.1)))
        keep = better[:, None, None]
        x, m = jnp.where(keep, next_x, x), jnp.where(keep, next_m, m)
        return iteration + 1, x, m, jnp.where(better, now, previous), better & (now > TOLERANCE)

    m = a * start
    x = jnp.broadcast_to(identity * start ** (1 / p), (n, r, r))
    first = error(m)
    _, x, _, _, _ = lax.while_loop(active, iterate, (0, x, m, first, first > TOLERANCE))
    x = (x + jnp.swapaxes(x, -2, -1)) / 2
    x_to_p = _matrix_power(x, p)
    residual = error(jnp.matmul(x_to_p, a, precision=HIGHEST))
    if cut:
        suppress = _matrix_power(identity - rho * x_to_p, 4)
        x = jnp.matmul(x, suppress, precision=HIGHEST)
        x = (x + jnp.swapaxes(x, -2, -1)) / 2
    x = jnp.where(real[:, :, None] & real[:, None, :], x, 0) * bound ** (-1 / p)
    return _finish(x, residual, largest, exponent, p)


def _regularised_powers(w, lmax, p: int, ridge: float, cut: float, xp):
    """Eigenvalues of the regularised matrix (0 where cut) and of its root; `xp` is numpy or jax.numpy."""
    w = xp.maximum(w, 0)
    kept = (w > cut * lmax) if cut else (w + ridge * lmax > 0)
    w = w if cut else w + ridge * lmax
    return xp.where(kept, w, 0), xp.where(kept, xp.where(kept, w, 1) ** (-1 / p), 0), kept


def _eigh(stack_nrr, p: int, ridge: float, cut: float, sizes_n) -> RootResult:
    """Eigendecomposition on the device. One batched call: two at once can deadlock on a CPU."""
    a, exponent, real = _prepare(stack_nrr, sizes_n)
    w, v = jnp.linalg.eigh(a)
    largest = jnp.maximum(w[:, -1], 0)
    kept_w, root_w, kept = _regularised_powers(w, largest[:, None], p, ridge, cut, jnp)
    x = jnp.einsum("nij,nj,nkj->nik", v, root_w, v, precision=HIGHEST)
    regularised = jnp.einsum("nij,nj,nkj->nik", v, kept_w, v, precision=HIGHEST)
    projector = jnp.einsum("nij,nj,nkj->nik", v, kept.astype(v.dtype), v, precision=HIGHEST)
    difference = jnp.matmul(_matrix_power(x, p), regularised, precision=HIGHEST) - projector
    both = real[:, :, None] & real[:, None, :]
    residual = jnp.max(jnp.abs(jnp.where(both, difference, 0)), axis=(-2, -1), initial=0.0)
    return _finish(jnp.where(both, x, 0), residual, largest, exponent, p)


def _host(stack_nrr, p: int, ridge: float, cut: float, sizes_n) -> RootResult:
    """Float64 LAPACK on the host, one matrix at a time; `numpy.linalg.eigh` releases the interpreter lock."""
    stack = np.asarray(stack_nrr, np.float64)
    n, r, _ = stack.shape
    sizes = np.full(n, r) if sizes_n is None else np.asarray(sizes_n)
    root, residual, largest = np.zeros((n, r, r), np.float32), np.ones(n, np.float32), np.zeros(n, np.float32)
    for i, size in enumerate(sizes):
        a = stack[i, :size, :size]
        w, v = np.linalg.eigh((a + a.T) / 2)
        if size == 0 or w[-1] <= 0:
            continue
        kept_w, root_w, kept = _regularised_powers(w, w[-1], p, ridge, cut, np)
        x = (v * root_w) @ v.T
        difference = np.linalg.matrix_power(x, p) @ ((v * kept_w) @ v.T) - (v * kept) @ v.T
        root[i, :size, :size], residual[i], largest[i] = x, np.max(np.abs(difference)), w[-1]
    return RootResult(jnp.asarray(root), jnp.asarray(residual), jnp.asarray(largest))


SOLVERS: dict[str, Callable[..., RootResult]] = {"newton": _newton, "eigh": _eigh, "host": _host}
