"""Muon: replace the momentum by its nearest semi-orthogonal matrix, using matrix products only (Jordan et al. 2024)."""

from typing import Any

import jax
import jax.numpy as jnp

from .base import Preconditioner, PreconditionerState

# Coefficients of odd polynomials a x + b x^3 + c x^5, applied in sequence to singular values in (0, 1].
POLYNOMIALS = {
    # Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    "jordan": ((3.4445, -4.7750, 2.0315),) * 5,
    # Amsel et al., "The Polar Express" (arXiv 2505.16932), section 4; optimal for singular values from 1e-3 on.
    "polar_express": (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ),
}
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
    grafts = False
    matrices_only = True

    def order(self, exponent: float | None, sides: int) -> int:
        """Return 0: no side has statistics."""
        del exponent, sides
        return 0

    def title(self, p: int) -> str:
        """Return the common name."""
        return "Muon"

    def act(
        self,
        m: jax.Array,
        g: jax.Array,
        state: PreconditionerState,
        bucket: Any,
        sizes: jax.Array,
        step: jax.Array,
        options: Any,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the orthogonal factor, scaled to the norm of Adam's update."""
        del g, state, bucket, step
        x = orthogonalized(m, POLYNOMIALS[options.orthogonalization])
        return x * (RMS * jnp.sqrt(jnp.max(sizes, axis=-1).astype(jnp.float32)))[:, None, None], None


def orthogonalized(m_nrc: jax.Array, polynomials: tuple[tuple[float, float, float], ...]) -> jax.Array:
    """Return approximately U V' for each M = U S V' of a stack.

    Args:
      m_nrc: [n, r, c] with r <= c.
      polynomials: coefficients of odd polynomials that map singular values towards 1, in order.
    """
    largest = jnp.max(jnp.abs(m_nrc), axis=(-2, -1), keepdims=True)
    x = m_nrc / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = x / jnp.where(norm > 0, _MARGIN * norm, 1)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    for a, b, c in polynomials:
        square = product(x, jnp.swapaxes(x, -2, -1))
        x = a * x + product(b * square + c * product(square, square), x)
    return x
