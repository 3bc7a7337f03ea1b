"""Muon: replace the momentum by its nearest semi-orthogonal matrix, using matrix products only (Jordan et al. 2024)."""

import jax
import jax.numpy as jnp

from .base import Blocks, Preconditioner, PreconditionerState

# Coefficients of an odd polynomial a x + b x^3 + c x^5, applied five times to singular values in (0, 1] (Jordan et al.,
# "Muon: An optimizer for hidden layers in neural networks", 2024).
POLYNOMIAL = (3.4445, -4.7750, 2.0315)
_TIMES = 5
# Root mean square of an update of full rank. It is that of Adam's updates, so that Adam's learning rates carry over
# (Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2).
RMS = 0.2
# Keeps the largest singular value below 1 despite rounding.
_MARGIN = 1.01


class Muon(Preconditioner):
    """The direction 0.2 sqrt(max(r, c)) U V' for the momentum M = U S V' of a block r x c.

    It keeps no statistics. With block_size at least a matrix's longer side, it acts on the whole matrix.
    """

    name = "muon"
    label = "Muon"
    grafts = False
    matrices_only = True
    p = 0

    def act(
        self, m: jax.Array, g: jax.Array, state: PreconditionerState, age: jax.Array, blocks: Blocks
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the orthogonal factor, scaled to the norm of Adam's update."""
        del g, state, age
        return orthogonalized(m) * (RMS * jnp.sqrt(jnp.max(blocks.sizes, axis=-1).astype(jnp.float32)))[
            :, None, None
        ], None


def orthogonalized(m_nrc: jax.Array) -> jax.Array:
    """Return approximately U V' for each M = U S V' of a stack [n, r, c] with r <= c."""
    largest = jnp.max(jnp.abs(m_nrc), axis=(-2, -1), keepdims=True)
    x = m_nrc / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = x / jnp.where(norm > 0, _MARGIN * norm, 1)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    a, b, c = POLYNOMIAL
    for _ in range(_TIMES):
        square = product(x, jnp.swapaxes(x, -2, -1))
        x = a * x + product(b * square + c * product(square, square), x)
    return x
