"""Inverse p-th roots by float32 matrix multiplications only.

Every product uses the highest precision, regardless of the global setting: the iterations diverge in bfloat16 and TF32.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Smallest eigenvalue, relative to the largest, that float32 distinguishes from zero.
RESOLUTION = 1e-7
# Convergence is quadratic: the last step starts within CLOSE of the identity and is exact in float32.
CLOSE = 3e-4
# An iteration that ends further than this from the identity has not converged.
NEAR = 0.3


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


def inverse_root(a_nrr: jax.Array, p: int, ridge: float) -> tuple[jax.Array, jax.Array, jax.Array]:
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
