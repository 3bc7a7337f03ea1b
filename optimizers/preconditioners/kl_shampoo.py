"""KL-Shampoo: statistics of gradients whitened along the other sides (arXiv 2509.03378)."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..linalg.scaling import power_of_two
from .base import PreconditionerState, multiplied
from .shampoo import Shampoo


class KLShampoo(Shampoo):
    """Shampoo whose statistics approximate the gradients' covariance by Kullback-Leibler divergence.

    For a side a, with b the other side and d_b its length:
        S_a <- beta2 S_a + (1 - beta2) G S_b^(-1) G' / d_b
    These are the stationary points of the divergence between normal distributions with the covariances E[g g'] and
    S_a (x) S_b (theorem 1 of the paper). Roots have order 2. A block without roots uses S_b = I.
    """

    name = "kl_shampoo"
    statistics = "second moments of whitened gradients"
    has_exponent = False

    def power(self, sides: int) -> float:
        """Return 2 / sides: the product over all sides has degree 2."""
        return 2.0 / sides

    def order(self, exponent: float | None, sides: int) -> int:
        """Return 2: factors are inverse square roots of the covariance."""
        del exponent, sides
        return 2

    def title(self, p: int) -> str:
        """Return the common name."""
        return "KL"

    def observed(self, g: jax.Array, state: PreconditionerState, bucket: Any, sizes: jax.Array, side: int) -> jax.Array:
        """Return the gradient whitened along the other sides, divided by the square root of their lengths."""
        others = [number for number, other in enumerate(bucket.sides) if other != side]
        if not others:
            return g
        found = state.refreshed > 0
        # Convert from the units of the roots to those of g.
        share = self.power(len(bucket.sides)) / bucket.p
        change = power_of_two(share * jnp.where(found, state.scale_log2 - state.roots_scale_log2, 0))
        factors = []
        for number in others:
            identity = jnp.eye(bucket.shape[bucket.sides[number]], dtype=g.dtype)
            root = change[:, None, None] * state.roots[number]
            factors.append(jnp.where(found[:, None, None], root, identity))
        lengths = math.prod(sizes[:, bucket.sides[number]].astype(jnp.float32) for number in others)
        x = multiplied(g, factors, [bucket.sides[number] for number in others])
        return x / jnp.sqrt(jnp.maximum(lengths, 1)).reshape(-1, *[1] * (g.ndim - 1))
