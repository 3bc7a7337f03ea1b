"""KL-Shampoo: each side's statistics are of gradients whitened by the other sides (arXiv 2509.03378)."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from .base import Blocks, multiplied
from .shampoo import Shampoo


class KLShampoo(Shampoo):
    """Shampoo whose statistics approximate the gradients' covariance by Kullback-Leibler divergence.

    S_a <- beta2 S_a + (1 - beta2) G S_b^(-1) G' / d_b for a side a, with b the other and d_b its length, and likewise
    for b: the stationary points of the divergence between normal distributions of the covariances E[g g'] and
    S_a (x) S_b (theorem 1 there). The roots are of order 2, each side's power is -1/2: then S_b^(-1) G' is two of them
    on the other side. Before a block has roots the others' statistics count as the identity, which makes the first
    statistics those of one-sided Shampoo.
    """

    name = "kl_shampoo"
    statistics = "second moments of whitened gradients"
    has_exponent = False

    def power(self, sides: int) -> float:
        """The product over all sides has two, each an equal share."""
        return 2.0 / sides

    def order(self, exponent: float | None, sides: int) -> int:
        """2: all sides together are the covariance, and the gradient is multiplied by its inverse square root."""
        del exponent, sides
        return 2

    def title(self, p: int) -> str:
        """As people call it."""
        return "KL"

    def observed(self, g: jax.Array, blocks: Blocks, side: int) -> jax.Array:
        """The gradient whitened along the other preconditioned sides, over the root of their lengths."""
        others = [number for number, other in enumerate(blocks.sides) if other != side]
        if not others:
            return g
        # The factors are of gradients as they are, these here are divided by 2^exponent.
        back = jnp.exp2(-self.shift(blocks.exponent, blocks.group))
        factors = []
        for number in others:
            length = g.shape[blocks.sides[number] + 1]
            whole = jnp.where(blocks.found, back, 0)[:, None, None] * blocks.factors[number]
            factors.append(jnp.where(blocks.found[:, None, None], whole, jnp.eye(length, dtype=g.dtype)))
        lengths = math.prod(blocks.sizes[:, blocks.sides[number]].astype(jnp.float32) for number in others)
        x = multiplied(g, factors, [blocks.sides[number] for number in others])
        return x / jnp.sqrt(jnp.maximum(lengths, 1)).reshape(-1, *[1] * (g.ndim - 1))

    def takes(self, exponent: jax.Array, group: Any) -> jax.Array:
        """All: 2 / sides powers for each side, shared by the order of the roots, which is 2."""
        del group
        return exponent
