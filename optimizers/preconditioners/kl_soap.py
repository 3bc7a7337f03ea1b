"""KL-SOAP: Adam in the eigenbasis of KL-Shampoo's statistics (arXiv 2509.03378, section 4)."""

import math

import jax
import jax.numpy as jnp

from ..linalg import newton
from .base import Blocks, multiplied
from .kl_shampoo import KLShampoo
from .soap import Soap


class KLSoap(Soap):
    """SOAP whose statistics are those of KL-Shampoo, whitened in the eigenbases of the other sides.

    Another side's eigenvalues are taken from its statistics in the basis that is there, diag(Q' S Q), and bounded from
    below by the ridge. Before the first basis S is the identity.
    """

    name = "kl_soap"
    statistics = KLShampoo.statistics
    reads_statistics = True

    def power(self, sides: int) -> float:
        """As in KL-Shampoo."""
        return 2.0 / sides

    def title(self, p: int) -> str:
        """As people call it."""
        return "KL-SOAP"

    def observed(self, g: jax.Array, blocks: Blocks, side: int) -> jax.Array:
        """The gradient turned into the bases of the other sides and whitened there; it need not be turned back."""
        others = [number for number, other in enumerate(blocks.sides) if other != side]
        whitening = [_whitening(blocks, number) for number in others]
        lengths = math.prod(blocks.sizes[:, blocks.sides[number]].astype(jnp.float32) for number in others)
        x = multiplied(g, whitening, [blocks.sides[number] for number in others])
        return x / jnp.sqrt(jnp.maximum(lengths, 1)).reshape(-1, *[1] * (g.ndim - 1))


def _whitening(blocks: Blocks, number: int) -> jax.Array:
    """diag(Q' S Q)^(-1/2) Q' of one side [n, r, r], the identity before the first basis."""
    s, q = blocks.statistics()[number], blocks.factors[number]
    values = jnp.sum(q * newton.matmul(s, q), axis=-2)
    floor = max(blocks.group.ridge, blocks.group.cut) * jnp.max(values, axis=-1, keepdims=True)
    values = jnp.maximum(values, floor)
    root = jnp.where(values > 0, jax.lax.rsqrt(jnp.where(values > 0, values, 1)), 0)
    identity = jnp.eye(q.shape[-1], dtype=q.dtype)
    return jnp.where(blocks.found[:, None, None], root[:, :, None] * jnp.swapaxes(q, -2, -1), identity)
