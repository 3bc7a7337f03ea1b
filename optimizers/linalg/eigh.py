"""Inverse p-th roots by one batched eigendecomposition on the device."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import roots
from .lapack import regularised

# Number of corrections times p. Each reduces the error by a factor of at least 1.5^p at condition 1e12 with a ridge of
# 1e-6, until rounding dominates.
CORRECTIONS = 12


def eigh(stack_nrr, p: int, ridge: float, cut: float, sizes_n, precision: Any = None) -> roots.RootResult:
    """Compute roots by one batched eigendecomposition, corrected by perturbation theory, in full float32.

    LAPACK's eigenvalues have errors of several ulp of the largest, a few per cent of the smallest at condition 1e6. In
    LAPACK's basis V, C = V' A V = diag(w) + G with a small G. Starting from F = diag(w^(-1/p)), each correction adds
      f[w_i, w_j] D_ij, with D = diag(w^(1/2)) (F^(p/2) C F^(p/2) - I) diag(w^(1/2)),
    where f[.,.] are divided differences of w^(-1/p). The first is perturbation theory to first order (Daleckii and
    Krein). Further ones matter for the smallest eigenvalues, where G may be as large as w.
    """
    del precision
    given = roots.prepare(stack_nrr, sizes_n)
    a = given.a + given.padding
    # One call for the whole batch: two independent LAPACK calls can deadlock a CPU.
    _, v = jnp.linalg.eigh(a)
    transposed = jnp.swapaxes(v, -2, -1)
    b = roots.symmetric(roots.matmul(transposed, _product(a, v)))
    w = jnp.diagonal(b, axis1=-2, axis2=-1)
    largest = jnp.max(w, axis=-1)
    w_shifted, root_w, above = regularised(w, largest[:, None], p, ridge, cut, jnp)

    kept = root_w > 0
    both, one = kept[:, :, None] & kept[:, None, :], kept[:, :, None] ^ kept[:, None, :]
    shifted_i, shifted_j = w_shifted[:, :, None], w_shifted[:, None, :]
    mean = (shifted_i + shifted_j) / 2
    gap = jnp.where(both, shifted_i - shifted_j, w[:, :, None] - w[:, None, :])
    near = both & (jnp.abs(gap) <= 0.02 * mean)
    quotient = (root_w[:, :, None] - root_w[:, None, :]) / jnp.where(near | (gap == 0), 1, gap)
    slope = jnp.where(near, -(jnp.where(near, mean, 1) ** (-1 / p - 1)) / p, quotient)
    identity = jnp.eye(a.shape[-1], dtype=a.dtype)
    g = jnp.where(identity > 0, 0, b)
    # Negative eigenvalues all count as zero, so nothing between two of them changes the root.
    coupled = both & (above[:, :, None] | above[:, None, :])
    c = w_shifted[:, :, None] * identity + jnp.where(coupled, g, 0)
    left, right = w_shifted ** (p // 2 / p), w_shifted ** ((p + 1) // 2 / p)

    def corrected(_, f: jnp.ndarray) -> jnp.ndarray:
        low, high = roots.halves(f, p)
        product = roots.matmul(c, high)
        excess = (product if low is None else roots.matmul(low, product)) - kept[:, :, None] * identity
        return f + jnp.where(coupled, slope, 0) * roots.symmetric(left[:, :, None] * excess * right[:, None, :])

    f = lax.fori_loop(0, max(2, CORRECTIONS // p), corrected, root_w[:, :, None] * identity)
    # Across the cut the quotient is unbounded, and valid only for well separated eigenvalues.
    f += jnp.where(one & (jnp.abs(gap) > mean), slope, 0) * g
    x = roots.symmetric(roots.matmul(roots.matmul(v, f), transposed))

    if cut:
        unit = roots.matmul(v * above[:, None, :], transposed)
    else:
        unit = jnp.zeros_like(a) + jnp.eye(a.shape[-1], dtype=a.dtype)
        a = a + ridge * largest[:, None, None] * unit - roots.matmul(v * jnp.minimum(w, 0)[:, None, :], transposed)
    low, high = roots.halves(x, p)
    residual = roots.residual(low, high, a, unit)
    if not ridge and not cut:
        residual = jnp.where(jnp.all(above, axis=-1), residual, jnp.maximum(residual, 1))
    smallest = jnp.min(jnp.where(root_w > 0, w_shifted, jnp.inf), axis=-1)
    return roots.finish(given, p, x, residual, largest, jnp.max(w_shifted, axis=-1) / smallest)


def _product(a_nrr: jax.Array, v_nrr: jax.Array) -> jax.Array:
    """Return A V, accurate even where large terms cancel, for entries of at most 1.

    It sums products of leading bits, which are exact in float32 for any order of summation (Ozaki et al., "Error-free
    transformations of matrix multiplication", Numerical Algorithms 59, 2012). The plain product has errors of an ulp of
    the largest eigenvalue, which are several per cent of a ridge of 1e-6.
    """
    bits = (24 - math.ceil(math.log2(a_nrr.shape[-1]))) // 2

    def sliced(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        first = jnp.round(x * 2.0**bits) * 2.0**-bits
        second = jnp.round((x - first) * 4.0**bits) * 4.0**-bits
        return first, second, x - first - second

    (a, b, c), (u, v, w) = sliced(a_nrr), sliced(v_nrr)
    small = roots.matmul(a, w) + roots.matmul(b, v + w) + roots.matmul(c, v_nrr)
    return roots.matmul(a, u) + (roots.matmul(a, v) + roots.matmul(b, u)) + small
