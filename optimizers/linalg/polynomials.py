"""Inverse roots and orthogonal factors by a fixed number of matrix products: compositions of polynomials."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .newton import coupled_newton
from .precision import FULL
from .roots import (
    RootResult,
    condition,
    finish,
    halves,
    largest_eigenvalue,
    matmul,
    matrix_power,
    prepare,
    residual,
    symmetric,
)

# Smallest ridge of the minimax iteration. At smaller ones rounding errors grow: at 1e-6 the residual of a singular
# matrix is above 1.
SMALLEST_RIDGE = 1e-4
# Steps follow until all eigenvalues of X^p (A + ridge I) are this close to 1.
_TOLERANCE = 1e-5
# Eigenvalues are scaled to at most 1 / _MARGIN, because the largest one is an estimate.
_MARGIN = 1.05
# Coefficients of the odd polynomial a x + b x^3 + c x^5. Each step brings singular values in (0, 1] closer to 1 (Jordan
# et al., "Muon: An optimizer for hidden layers in neural networks", 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Keeps the largest singular value below 1 despite rounding.
_ROUNDING = 1.01


def newton(stack_nrr: Any, p: int, ridge: float, cut: float, sizes_n: Any, precision: Any = FULL) -> RootResult:
    """Compute roots with a ridge by matrix products only; `cut` must be 0.

    The minimax iteration takes fewer products. At ridges below SMALLEST_RIDGE the coupled Newton iteration replaces it,
    in full float32. `precision` is that of the former's products.
    """
    assert not cut
    given = prepare(stack_nrr, sizes_n)
    square = matmul(given.a, given.a)
    largest = largest_eigenvalue(given.a, square)
    # Replace a zero matrix by the identity, so that the iteration converges.
    nonzero = (largest > 0)[:, None, None]
    bound = jnp.where(nonzero, largest[:, None, None], 1)
    identity = jnp.eye(given.a.shape[-1], dtype=given.a.dtype)
    a = jnp.where(given.real & nonzero, given.a / bound, identity)
    if ridge >= SMALLEST_RIDGE:
        square = jnp.where(given.real & nonzero, square / bound**2, identity)
        x, found, number = minimax(a, square, p, ridge, precision)
    else:
        x, found, number = coupled_newton(a, p, ridge)
    return finish(given, p, x * bound ** (-1 / p), found, largest, number)


def minimax(
    a_nrr: jax.Array, square_nrr: jax.Array, p: int, ridge: float, precision: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return roots [n, r, r], residuals [n] and condition numbers [n] of A + ridge I, for A with largest eigenvalue 1.

    M = (A + ridge I) / scale, X = I; in each step X <- X T(M) and M <- M T(M)^p. For p = 2 and a ridge of 1e-4 these
    are 5 steps with 16 products. They are those of Amsel et al., "The Polar Express" (arXiv 2505.16932), in the coupled
    form of Guo and Higham (2006). An eigenvalue below -ridge makes the residual at least 1.

    Args:
      a_nrr: [n, r, r], A.
      square_nrr: [n, r, r], A A.
      p: order of the root.
      ridge: at least SMALLEST_RIDGE.
      precision: of the products; three bfloat16 passes suffice.
    """
    identity = jnp.eye(a_nrr.shape[-1], dtype=a_nrr.dtype)
    scale = _MARGIN * (1 + ridge)
    regularised = a_nrr + ridge * identity
    m, square = regularised / scale, (square_nrr + 2 * ridge * a_nrr + ridge**2 * identity) / scale**2
    steps, x = polynomials(p, ridge / scale), None
    for number, (a, b, c) in enumerate(steps, 1):
        square = matmul(m, m, precision) if number > 1 else square
        t = a * identity + b * m + c * square
        x = t if x is None else matmul(x, t, precision)
        if number < len(steps):
            m = symmetric(matmul(matrix_power(t, p, precision), m, precision))
    assert x is not None
    x = symmetric(x) * scale ** (-1 / p)
    low, high = halves(x, p, precision)
    return x, residual(low, high, regularised, identity, precision), condition(low, high, ridge)


@cache
def polynomials(p: int, smallest: float) -> tuple[tuple[float, float, float], ...]:
    """Return coefficients (a, b, c) of T(m) = a + b m + c m^2 for each step m <- m T(m)^p.

    Each T minimises the largest |m^(1/p) T(m) - 1| over the interval of the eigenvalues m, which begins as
    [smallest, 1]. It is then divided by its largest value, so that the next interval ends at 1 too. The last T is not:
    its result is centred at 1.
    """
    steps = []
    while True:
        coefficients, error = _best(p, smallest)
        if error <= _TOLERANCE:
            return (*steps, tuple(coefficients.tolist()))
        steps.append(tuple((coefficients / (1 + error)).tolist()))
        smallest = ((1 - error) / (1 + error)) ** p


def _best(p: int, smallest: float) -> tuple[np.ndarray, float]:
    """Return T and its largest error on [smallest, 1], by the algorithm of Remez.

    The functions m^(1/p), m^(1/p + 1) and m^(1/p + 2) form a Chebyshev system, so that the error of the best T has its
    largest absolute value at four points, with alternating signs.
    """
    grid = np.exp(np.linspace(np.log(smallest), 0, 2_001))
    basis = grid[:, None] ** (1 / p + np.arange(3))
    points = np.linspace(0, len(grid) - 1, 4).astype(int)
    for _ in range(30):
        system = np.concatenate([basis[points], [[1], [-1], [1], [-1]]], axis=1)
        coefficients = np.linalg.solve(system, np.ones(4))[:3]
        error = basis @ coefficients - 1
        changes = np.flatnonzero(np.diff(np.sign(error))) + 1
        parts = np.split(np.arange(len(grid)), changes)
        extrema = [part[np.argmax(np.abs(error[part]))] for part in parts]
        if len(extrema) != 4 or np.array_equal(extrema, points):
            break
        points = np.array(extrema)
    return coefficients, float(np.max(np.abs(error)))


def orthogonalized(m_nrc: jax.Array, steps: int, precision: Any = FULL) -> jax.Array:
    """Return approximately U V' for each M = U S V' of a stack [n, r, c], after this number of Newton-Schulz steps.

    Five steps bring singular values down to 1/100 of the Frobenius norm to between 0.7 and 1.2. A zero matrix stays
    zero. The result does not depend on the scale of M.
    """
    if m_nrc.shape[-2] > m_nrc.shape[-1]:
        return jnp.swapaxes(orthogonalized(jnp.swapaxes(m_nrc, -2, -1), steps, precision), -2, -1)
    largest = jnp.max(jnp.abs(m_nrc), axis=(-2, -1), keepdims=True)
    x = m_nrc / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = x / jnp.where(norm > 0, _ROUNDING * norm, 1)

    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        square = matmul(x, jnp.swapaxes(x, -2, -1), precision)
        x = a * x + matmul(b * square + c * matmul(square, square, precision), x, precision)
    return x
