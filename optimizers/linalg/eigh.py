"""Inverse p-th roots by one batched eigendecomposition on the device."""

import jax.numpy as jnp

from . import roots
from .lapack import regularised


def eigh(stack_nrr, p: int, ridge: float, cut: float, sizes_n) -> roots.RootResult:
    """Compute roots by one batched eigendecomposition, corrected by perturbation theory.

    LAPACK's eigenvalues have errors of several ulp of the largest, a few per cent of the smallest at condition 1e6. In
    LAPACK's basis V, B = V' A V = diag(w) + G with a small G, and with divided differences f[.,.] (Daleckii and Krein)
      f(B)_ij = f(w_i) for i = j, f[w_i, w_j] G_ij otherwise, plus sum_k f[w_i, w_k, w_j] G_ik G_kj.
    The second-order term matters for the smallest eigenvalues, where G may be a tenth of w. It is computed by a formula
    that is exact for equal eigenvalues.
    """
    given = roots.prepare(stack_nrr, sizes_n)
    a = given.a + given.padding
    # One call for the whole batch: two independent LAPACK calls can deadlock a CPU.
    _, v = jnp.linalg.eigh(a)
    transposed = jnp.swapaxes(v, -2, -1)
    b = roots.symmetric(roots.matmul(transposed, roots.accurate_matmul(a, v)))
    w = jnp.diagonal(b, axis1=-2, axis2=-1)
    largest = jnp.max(w, axis=-1)
    w_shifted, root_w, above = regularised(w, largest[:, None], p, ridge, cut, jnp)

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
    second = (p + 1) / (2 * p * p) * outer[:, :, None] * roots.matmul(g * inverse[:, None, :], g) * outer[:, None, :]
    f = roots.symmetric(first + second) + root_w[:, :, None] * jnp.eye(a.shape[-1], dtype=a.dtype)
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
