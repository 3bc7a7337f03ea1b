"""Muon: replace the momentum by its nearest semi-orthogonal matrix, using matrix products only (Jordan et al. 2024)."""

import jax
import jax.numpy as jnp

from ..linalg.polynomials import orthogonalized
from .base import Blocks, Preconditioner, PreconditionerState

# Root mean square of an update of full rank. It is that of Adam's updates, so that Adam's learning rates carry over
# (Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2).
RMS = 0.2
_STEPS = 5


class Muon(Preconditioner):
    """The direction 0.2 sqrt(max(r, c)) U V' for the momentum M = U S V' of a block r x c.

    It keeps no statistics. With block_size at least a matrix's longer side, it acts on the whole matrix.
    """

    name = "muon"
    label = "Muon"
    grafts = False
    matrices_only = True
    orthogonal = True
    p = 0

    def act(
        self, m: jax.Array, g: jax.Array, state: PreconditionerState, age: jax.Array, blocks: Blocks
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the orthogonal factor, scaled to the norm of Adam's update."""
        del g, state, age
        longer = jnp.max(blocks.sizes, axis=-1).astype(jnp.float32)[:, None, None]
        return orthogonalized(m, _STEPS, blocks.bucket.precision.action) * (RMS * jnp.sqrt(longer)), None
