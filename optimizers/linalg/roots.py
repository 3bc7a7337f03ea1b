"""Inverse p-th roots of stacks of positive semidefinite matrices by float32 matrix multiplications only.

Results do not depend on the scale of a matrix: a solver gets it divided by a power of two, and every tolerance, ridge
and cut is relative to its largest eigenvalue. Every product uses the highest precision, regardless of the global
setting: the iterations diverge in bfloat16 and TF32.
"""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .scaling import exponent_of, power_of_two

# Smallest eigenvalue, relative to the largest, that float32 distinguishes from zero.
RESOLUTION = 1e-7
# Convergence is quadratic: the last step starts within CLOSE of the identity and is exact in float32.
CLOSE = 3e-4
# An iteration that ends further than this from the identity has not converged.
NEAR = 0.3


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


def matmul(x_nrr: jax.Array, y_nrr: jax.Array) -> jax.Array:
    """Return X Y in full float32."""
    return jnp.matmul(x_nrr, y_nrr, precision=lax.Precision.HIGHEST)


def accurate_matmul(x_nrr: jax.Array, y_nrr: jax.Array) -> jax.Array:
    """Return X Y summed in up to 16 parts, which reduces rounding errors.

    Use it for products with the matrix itself, where small eigenvalues remain after large terms cancel.
    """
    r = x_nrr.shape[-1]
    parts = min(16, -(-r // 16))
    length = -(-r // parts)
    x = jnp.pad(x_nrr, ((0, 0), (0, 0), (0, parts * length - r)))
    y = jnp.pad(y_nrr, ((0, 0), (0, parts * length - r), (0, 0)))

    def add(k: jax.Array, total: jax.Array) -> jax.Array:
        left, right = (lax.dynamic_slice_in_dim(z, k * length, length, axis) for z, axis in ((x, -1), (y, -2)))
        return total + matmul(left, right)

    return lax.fori_loop(0, parts, add, jnp.zeros_like(x_nrr))


def symmetric(x_nrr: jax.Array) -> jax.Array:
    """Return (X + X') / 2."""
    return (x_nrr + jnp.swapaxes(x_nrr, -2, -1)) / 2


def matrix_power(x_nrr: jax.Array, p: int) -> jax.Array:
    """Return X^p by repeated squaring, for a static p >= 1."""
    if p == 1:
        return x_nrr
    power = matrix_power(matmul(x_nrr, x_nrr), p // 2)
    return matmul(power, x_nrr) if p % 2 else power


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the sum of x * y over all axes but the first, [n], as one dot product."""
    axes = tuple(range(1, x.ndim))
    return lax.dot_general(x, y, ((axes, axes), ((0,), (0,))), precision=lax.Precision.HIGHEST)


def _normalised(v: jax.Array) -> jax.Array:
    norm = jnp.sqrt(inner(v, v))[:, None, None]
    return v / jnp.where(norm > 0, norm, 1)


def _start(x_nrr: jax.Array) -> jax.Array:
    """Return X w [n, r, 1] for a fixed random w."""
    w = np.random.default_rng(0).normal(size=(x_nrr.shape[-1], 1)).astype(np.float32)
    return _normalised(matmul(x_nrr, jnp.asarray(w)))


def largest_eigenvalue(a_nrr: jax.Array) -> jax.Array:
    """Return a lower bound of the largest eigenvalue [n] of matrices whose largest entry is about 1.

    It is the Rayleigh quotient of A^256 w, whose relative error is at most ln(r) / 256.
    """
    power = lax.fori_loop(0, 8, lambda _, x: _normalised(matmul(x, x)), a_nrr)
    v = _start(power)
    return inner(v, matmul(a_nrr, v))


def halves(x_nrr: jax.Array, p: int) -> tuple[jax.Array | None, jax.Array]:
    """Return X^floor(p/2) (None for the identity) and X^ceil(p/2)."""
    low = matrix_power(x_nrr, p // 2) if p > 1 else None
    return low, x_nrr if low is None else matmul(low, x_nrr) if p % 2 else low


def residual(low_nrr: jax.Array | None, high_nrr: jax.Array, a_nrr: jax.Array, unit_nrr: jax.Array) -> jax.Array:
    """Return the largest entry of |X^(p/2) A X^(p/2) - P| [n], given the halves of X^p.

    X^p A - P would amplify the rounding of X^p: it is 0.4 for a root with an error of 1 %.
    """
    product = matmul(a_nrr, high_nrr)
    product = product if low_nrr is None else matmul(low_nrr, product)
    return jnp.max(jnp.abs(product - unit_nrr), axis=(-2, -1))


@cache
def newton_schedule(p: int, smallest: float) -> tuple[float, ...]:
    """Return the scale of M in each Newton step until all eigenvalues in [smallest, 1] have converged to 1.

    A step maps an eigenvalue m to f(m) = m ((p + 1 - m) / p)^p, which rises to f(1) = 1 and falls to f(p + 1) = 0. The
    scale s with f(s) = f(s smallest) raises the smallest eigenvalue most. Limiting f(s) to at least 0.2 keeps the
    largest eigenvalue away from rounding errors, and below p + 1 although its bound is an estimate.
    """

    def f(m: float) -> float:
        return m * ((p + 1 - m) / p) ** p if m > 1 else m * (1 + (1 - m) / p) ** p

    scales = []
    while smallest < 1 - CLOSE:
        inside, outside = 1.0, p + 1.0
        for _ in range(40 if smallest < 0.5 else 0):
            s = (inside + outside) / 2
            too_far = s * smallest > 1 or f(s) < max(0.2, f(s * smallest))
            inside, outside = (inside, s) if too_far else (s, outside)
        scales.append(inside)
        smallest = min(f(inside), f(inside * smallest))
    return tuple(scales)


def coupled_newton(a_nrr: jax.Array, p: int, ridge: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return roots [n, r, r], residuals [n] and condition numbers [n] of A + ridge I, for A with largest eigenvalue 1.

    Coupled Newton (Guo and Higham 2006; Anil et al. 2020, appendix) with a scale s in every step: M_0 = A, X_0 = I;
    T = ((p + 1) I - s M) / p; X <- s^(1/p) X T; M <- T^p s M. The number of steps depends only on p and the ridge, so
    that results do not depend on the batch. An eigenvalue below -ridge makes the residual infinite or NaN.
    """
    identity = jnp.eye(a_nrr.shape[-1], dtype=a_nrr.dtype)
    regularised = a_nrr + ridge * identity
    schedule = newton_schedule(p, max(ridge, RESOLUTION))
    scales = jnp.array(schedule, a_nrr.dtype)

    def step(k: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, m = state
        m = scales[k] * m
        t = ((p + 1) * identity - m) / p
        return matmul(x, scales[k] ** (1 / p) * t), symmetric(matmul(matrix_power(t, p), m))

    # The rounding error of the first product matters most, because the small eigenvalues are then smallest. So it is an
    # accurate product, without the part of T^p that is a multiple of the identity.
    m = schedule[0] * regularised
    t = ((p + 1) * identity - m) / p
    multiple = ((p + 1) / p) ** p
    m = symmetric(multiple * m + accurate_matmul(m, matrix_power(t, p) - multiple * identity))
    x, m = lax.fori_loop(1, len(schedule), step, (schedule[0] ** (1 / p) * t, m))
    off = jnp.sqrt(inner(m - identity, m - identity))
    x = symmetric(matmul(x, ((p + 1) * identity - m) / p))

    low, high = halves(x, p)
    found = residual(low, high, regularised, identity)
    found = jnp.where(off < NEAR, found, jnp.maximum(found, off))

    def apply(v: jax.Array) -> jax.Array:
        return matmul(high, v) if low is None else matmul(low, matmul(high, v))

    # Estimate 1 / smallest eigenvalue by 16 power iterations.
    v = lax.fori_loop(0, 16, lambda _, v: _normalised(apply(v)), _start(x))
    return x, found, (1 + ridge) * inner(v, apply(v))


class Prepared(NamedTuple):
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


def prepare(stack_nrr, sizes_n) -> Prepared:
    """Scale the matrices [n, r, r] of sizes `sizes_n` [n] (None: all r) for a solver."""
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
    return Prepared(symmetric(a), padding, real, scale_log2, finite)


def finish(given: Prepared, p: int, x_nrr, residual_n, largest_n, condition_n) -> RootResult:
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


def newton(stack_nrr, p: int, ridge: float, cut: float, sizes_n) -> RootResult:
    """Compute roots with a ridge by the coupled Newton iteration; `cut` must be 0."""
    assert not cut
    given = prepare(stack_nrr, sizes_n)
    largest = largest_eigenvalue(given.a)
    # Replace a zero matrix by the identity, so that the iteration converges.
    bound = jnp.where(largest > 0, largest, 1)[:, None, None]
    identity = jnp.eye(given.a.shape[-1], dtype=given.a.dtype)
    a = jnp.where(given.real & (largest > 0)[:, None, None], given.a / bound, identity)
    x, residual, condition = coupled_newton(a, p, ridge)
    return finish(given, p, x * bound ** (-1 / p), residual, largest, condition)
