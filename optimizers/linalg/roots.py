"""Parts that the solvers of inverse p-th roots share: their result, products, residuals and scaling.

Results do not depend on the scale of a matrix: a solver gets it divided by a power of two, and every tolerance, ridge
and cut is relative to its largest eigenvalue. No product follows JAX's global setting of precision: the iterations
diverge in bfloat16 and TF32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .precision import FULL
from .scaling import exponent_of, power_of_two


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


def matmul(x_nrr: jax.Array, y_nrr: jax.Array, precision: Any = FULL) -> jax.Array:
    """Return X Y, by default in full float32."""
    return jnp.matmul(x_nrr, y_nrr, precision=precision)


def symmetric(x_nrr: jax.Array) -> jax.Array:
    """Return (X + X') / 2."""
    return (x_nrr + jnp.swapaxes(x_nrr, -2, -1)) / 2


def matrix_power(x_nrr: jax.Array, p: int, precision: Any = FULL) -> jax.Array:
    """Return X^p by repeated squaring, for a static p >= 1."""
    if p == 1:
        return x_nrr
    power = matrix_power(matmul(x_nrr, x_nrr, precision), p // 2, precision)
    return matmul(power, x_nrr, precision) if p % 2 else power


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the sum of x * y over all axes but the first, [n], as one dot product."""
    axes = tuple(range(1, x.ndim))
    return lax.dot_general(x, y, ((axes, axes), ((0,), (0,))), precision=FULL)


def _normalised(v: jax.Array) -> jax.Array:
    norm = jnp.sqrt(inner(v, v))[:, None, None]
    return v / jnp.where(norm > 0, norm, 1)


def _start(x_nrr: jax.Array) -> jax.Array:
    """Return X w [n, r, 1] for a fixed random w."""
    w = np.random.default_rng(0).normal(size=(x_nrr.shape[-1], 1)).astype(np.float32)
    return _normalised(matmul(x_nrr, jnp.asarray(w)))


def largest_eigenvalue(a_nrr: jax.Array, square_nrr: jax.Array) -> jax.Array:
    """Return a lower bound of the largest eigenvalue [n] of matrices whose largest entry is about 1.

    It is the Rayleigh quotient of A^256 w for a fixed random w, whose relative error is at most ln(r) / 512.

    Args:
      a_nrr: [n, r, r], the matrices A.
      square_nrr: [n, r, r], A A.
    """
    v = lax.fori_loop(0, 128, lambda _, v: _normalised(matmul(square_nrr, v)), _start(square_nrr))
    return inner(v, matmul(a_nrr, v))


def condition(low_nrr: jax.Array | None, high_nrr: jax.Array, ridge: float) -> jax.Array:
    """Return the condition number [n] of A + ridge I for A with largest eigenvalue 1, from the halves of X^p.

    The smallest eigenvalue is estimated by 16 power iterations with the inverse.
    """

    def apply(v: jax.Array) -> jax.Array:
        return matmul(high_nrr, v) if low_nrr is None else matmul(low_nrr, matmul(high_nrr, v))

    v = lax.fori_loop(0, 16, lambda _, v: _normalised(apply(v)), _start(high_nrr))
    return (1 + ridge) * inner(v, apply(v))


def halves(x_nrr: jax.Array, p: int, precision: Any = FULL) -> tuple[jax.Array | None, jax.Array]:
    """Return X^floor(p/2) (None for the identity) and X^ceil(p/2)."""
    low = matrix_power(x_nrr, p // 2, precision) if p > 1 else None
    return low, x_nrr if low is None else matmul(low, x_nrr, precision) if p % 2 else low


def residual(
    low_nrr: jax.Array | None,
    high_nrr: jax.Array,
    a_nrr: jax.Array,
    unit_nrr: jax.Array,
    precision: Any = FULL,
) -> jax.Array:
    """Return the largest entry of |X^(p/2) A X^(p/2) - P| [n], given the halves of X^p.

    X^p A - P would amplify the rounding of X^p: it is 0.4 for a root with an error of 1 %.
    """
    product = matmul(a_nrr, high_nrr, precision)
    product = product if low_nrr is None else matmul(low_nrr, product, precision)
    return jnp.max(jnp.abs(product - unit_nrr), axis=(-2, -1))


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
