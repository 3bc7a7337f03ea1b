"""Inverse p-th roots by matrix multiplications alone, in float32.

Every product is pinned to the highest precision, whatever the global setting: in bfloat16 or TF32 none of these
iterations converges.
"""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
from jax import lax

# Relative to the largest, float32 cannot tell a smaller eigenvalue from zero.
RESOLUTION = 1e-7
# The smallest eigenvalue grows by ((p + 1) / p)^p >= 2 per iteration at least: 40 cover float32 without a schedule.
MAX_ITERATIONS = 40
# Convergence is quadratic: one step from CLOSE is exact in float32. NEAR is where a rise of the error means rounding.
NEAR, CLOSE = 0.3, 3e-4
# A smallest eigenvalue below the ridge by more than this factor is negative without the ridge, and not by rounding.
BELOW_RIDGE = 1.25


def matmul(x_nrr: jax.Array, y_nrr: jax.Array) -> jax.Array:
    """X Y in full float32."""
    return jnp.matmul(x_nrr, y_nrr, precision=lax.Precision.HIGHEST)


def accurate_matmul(x_nrr: jax.Array, y_nrr: jax.Array) -> jax.Array:
    """The product summed in up to 16 parts: rounding grows with the number of terms that are summed in a row.

    For the one product of a solver whose rounding decides its accuracy: that of the matrix itself, where the small
    eigenvalues are what is left after large terms have cancelled.
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
    """(X + X') / 2, which removes the half of the rounding that no root of a symmetric matrix has."""
    return (x_nrr + jnp.swapaxes(x_nrr, -2, -1)) / 2


def matrix_power(x_nrr: jax.Array, p: int) -> jax.Array:
    """X^p by repeated squaring with static p >= 1."""
    if p == 1:
        return x_nrr
    power = matrix_power(matmul(x_nrr, x_nrr), p // 2)
    return matmul(power, x_nrr) if p % 2 else power


def _normalised(v: jax.Array) -> jax.Array:
    norm = jnp.sqrt(jnp.sum(v * v, axis=(-2, -1), keepdims=True))
    return v / jnp.where(norm > 0, norm, 1)


def _leading(power_nrr: jax.Array, apply: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Leading eigenvectors [n, r, 1] by 16 power iterations.

    The start is the column with the largest diagonal entry, whose overlap with the leading eigenvector is at least 1/r.
    """
    column = jnp.argmax(jnp.diagonal(power_nrr, axis1=-2, axis2=-1), axis=-1)
    start = _normalised(jnp.take_along_axis(power_nrr, column[:, None, None], axis=-1))
    return lax.fori_loop(0, 16, lambda _, v: _normalised(apply(v)), start)


def largest_eigenvalue(a_nrr: jax.Array) -> jax.Array:
    """Largest eigenvalue [n] of matrices whose largest entry is about 1, low by at most ln(r) / 544.

    The Rayleigh quotient after 272 power iterations in effect, on A^16.
    """
    power = lax.fori_loop(0, 4, lambda _, x: matmul(x, x), _normalised(a_nrr))
    v = _leading(power, lambda v: matmul(power, v))
    return jnp.sum(v * matmul(a_nrr, v), axis=(-2, -1))


def halves(x_nrr: jax.Array, p: int) -> tuple[jax.Array | None, jax.Array]:
    """X^floor(p/2) (None for the identity) and X^ceil(p/2)."""
    low = matrix_power(x_nrr, p // 2) if p > 1 else None
    return low, x_nrr if low is None else matmul(low, x_nrr) if p % 2 else low


def residual(low_nrr: jax.Array | None, high_nrr: jax.Array, a_nrr: jax.Array, unit_nrr: jax.Array) -> jax.Array:
    """Largest entry of |X^(p/2) A X^(p/2) - P| [n] from the halves of X^p.

    X^p A - P leaves the rounding of X^p undamped on one side: it says 0.4 of a root that is right to 1 %.
    """
    product = matmul(a_nrr, high_nrr)
    product = product if low_nrr is None else matmul(low_nrr, product)
    return jnp.max(jnp.abs(product - unit_nrr), axis=(-2, -1))


def _distance(m_nrr: jax.Array) -> jax.Array:
    """Frobenius norm of M - I [n]: the largest entry would hide one stray direction among hundreds."""
    return jnp.sqrt(jnp.sum((m_nrr - jnp.eye(m_nrr.shape[-1], dtype=m_nrr.dtype)) ** 2, axis=(-2, -1)))


@cache
def _newton_schedule(p: int, smallest: float) -> tuple[float, ...]:
    """What M is scaled by before each Newton step, for eigenvalues in [smallest, 1].

    A step maps an eigenvalue m to f(m) = m ((p + 1 - m) / p)^p, which rises to f(1) = 1 and falls to f(p + 1) = 0. The
    scale s with f(s) = f(s smallest) raises the smallest most. That f(s) stays above 0.2 keeps the largest out of
    rounding, and below p + 1 although its bound is an estimate.
    """

    def f(m: float) -> float:
        return m * ((p + 1 - m) / p) ** p if m > 1 else m * (1 + (1 - m) / p) ** p

    scales = []
    while smallest < 0.5:
        inside, outside = 1.0, p + 1.0
        for _ in range(40):
            s = (inside + outside) / 2
            too_far = s * smallest > 1 or f(s) < max(0.2, f(s * smallest))
            inside, outside = (inside, s) if too_far else (s, outside)
        scales.append(inside)
        smallest = min(f(inside), f(inside * smallest))
    return (*scales, *[1.0] * MAX_ITERATIONS)[:MAX_ITERATIONS]


def _coupled_newton(a_nrr: jax.Array, p: int, smallest: float, wanted_n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A^(-1/p) for eigenvalues in [smallest, 1], and how far the iteration was from its end [n].

    Guo and Higham 2006 (Anil et al. 2020, appendix), with a scale s in every step: M_0 = A, X_0 = I;
    T = ((p + 1) I - s M) / p; X <- s^(1/p) X T; M <- T^p s M. Matrices that are not wanted cost no iteration.
    """
    r = a_nrr.shape[-1]
    identity = jnp.eye(r, dtype=a_nrr.dtype)
    schedule = _newton_schedule(p, smallest)
    scales = jnp.array(schedule, a_nrr.dtype)

    def step(state):
        k, x, m, before, running = state
        scale = jnp.where(before < NEAR, 1, scales[k])[:, None, None]
        t = ((p + 1) * identity - scale * m) / p
        next_x = matmul(x, scale ** (1 / p) * t)
        next_m = symmetric(matmul(matrix_power(t, p), scale * m))
        now = _distance(next_m)
        # Far from the end all eigenvalues are in (0, 1]; a negative one grows without bound.
        better = running & (now < jnp.where(before < NEAR, before, 1.5 * r**0.5))
        keep = better[:, None, None]
        x, m, now = jnp.where(keep, next_x, x), jnp.where(keep, next_m, m), jnp.where(better, now, before)
        return k + 1, x, m, now, better & (now > CLOSE)

    # Rounding of the first product weighs most, since the small eigenvalues are smallest: it is summed with care, and
    # the part of T^p that is a multiple of the identity is kept out of the sums.
    m = schedule[0] * a_nrr
    t = ((p + 1) * identity - m) / p
    multiple = ((p + 1) / p) ** p
    m = symmetric(multiple * m + accurate_matmul(m, matrix_power(t, p) - multiple * identity))
    off = _distance(m)
    state = (jnp.int32(1), schedule[0] ** (1 / p) * t, m, off, wanted_n & (off > CLOSE))
    _, x, m, off, _ = lax.while_loop(lambda s: jnp.any(s[-1]) & (s[0] < MAX_ITERATIONS), step, state)
    return symmetric(matmul(x, ((p + 1) * identity - m) / p)), off


@cache
def _sign_schedule() -> tuple[float, ...]:
    """Scales of S before each step S <- S (3 - S^2) / 2, for eigenvalues in +-[RESOLUTION, 1].

    sqrt(3 / (1 + l + l^2)) is optimal for +-[l, 1] (Chen and Chow 2014); 1.6 keeps the largest out of rounding.
    """
    scales, smallest = [], RESOLUTION
    while smallest < 0.95:
        scale = min(1.6, (3 / (1 + smallest + smallest**2)) ** 0.5)
        scales.append(scale)
        smallest = min(scale * x * (3 - (scale * x) ** 2) / 2 for x in (smallest, 1.0))
    return (*scales, 1.0, 1.0)


def _positive_part(a_nrr: jax.Array) -> jax.Array:
    """Return A (I + sign(A)) / 2: A without its negative eigenvalues. The largest eigenvalue is 1."""
    scales = jnp.array(_sign_schedule(), a_nrr.dtype)
    identity = jnp.eye(a_nrr.shape[-1], dtype=a_nrr.dtype)

    def step(k: jax.Array, s: jax.Array) -> jax.Array:
        s = s * scales[k]
        return symmetric(matmul(s, 1.5 * identity - 0.5 * matmul(s, s)))

    sign = lax.fori_loop(0, len(scales), step, a_nrr)
    return symmetric(accurate_matmul(a_nrr, (identity + sign) / 2))


def inverse_root(a_nrr: jax.Array, p: int, ridge: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return roots [n, r, r], residuals [n] and condition numbers [n] of matrices with largest eigenvalue 1.

    The first attempt takes A + ridge I. If it does not converge, or finds an eigenvalue below the ridge, a second
    attempt takes A without its negative eigenvalues.
    """
    identity = jnp.zeros_like(a_nrr) + jnp.eye(a_nrr.shape[-1], dtype=a_nrr.dtype)

    def solve(a: jax.Array, wanted: jax.Array):
        regularised = a + ridge * identity
        x, distance = _coupled_newton(regularised, p, max(ridge, RESOLUTION), wanted)
        low, high = halves(x, p)
        off = residual(low, high, regularised, identity)

        def apply(v: jax.Array) -> jax.Array:
            return matmul(high, v) if low is None else matmul(low, matmul(high, v))

        v = _leading(x, apply)
        norm = jnp.sum(v * apply(v), axis=(-2, -1))
        converged = distance < NEAR
        off = jnp.where(converged, off, jnp.maximum(off, distance))
        return x, off, (1 + ridge) * norm, converged & (ridge * norm <= BELOW_RIDGE)

    everywhere = jnp.ones_like(a_nrr[:, 0, 0], bool)
    if not ridge:
        return solve(a_nrr, everywhere)[:3]

    def attempt(state):
        k, x, off, condition, wanted = state
        # Both attempts in one loop: the solver is compiled once.
        a = lax.cond(k > 0, _positive_part, lambda a: a, a_nrr)
        new_x, new_off, new_condition, good = solve(a, wanted)
        x = jnp.where(wanted[:, None, None], new_x, x)
        off, condition = jnp.where(wanted, new_off, off), jnp.where(wanted, new_condition, condition)
        return k + 1, x, off, condition, wanted & ~good

    none = jnp.zeros_like(a_nrr[:, 0, 0])
    state = (jnp.int32(0), jnp.zeros_like(a_nrr), none, none, everywhere)
    _, x, off, condition, _ = lax.while_loop(lambda s: jnp.any(s[-1]) & (s[0] < 2), attempt, state)
    return x, off, condition
