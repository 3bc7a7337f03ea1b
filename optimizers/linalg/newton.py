"""Inverse p-th roots by the coupled Newton iteration, in float32."""

from functools import cache

import jax
import jax.numpy as jnp
from jax import lax

from .roots import (
    condition,
    halves,
    inner,
    matmul,
    matrix_power,
    residual,
    symmetric,
)

# Smallest eigenvalue, relative to the largest, that float32 distinguishes from zero.
RESOLUTION = 1e-7
# Convergence is quadratic: the last step starts within CLOSE of the identity and is exact in float32.
CLOSE = 3e-4
# An iteration that ends further than this from the identity has not converged.
NEAR = 0.3


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
    return x, found, condition(low, high, ridge)
