"""KL-Shampoo: statistics of gradients whitened along the other sides (arXiv 2509.03378)."""

import math

import jax
import jax.numpy as jnp

from ..linalg.scaling import power_of, power_of_two
from .base import Blocks, PreconditionerState, multiplied
from .shampoo import Shampoo


class KLShampoo(Shampoo):
    """Shampoo whose statistics approximate the gradients' covariance by Kullback-Leibler divergence.

    For a side a, with b the other side and d_b its length:
        S_a <- beta2 S_a + (1 - beta2) G S_b^(-1) G' / d_b
    These are the stationary points of the divergence between normal distributions with the covariances E[g g'] and
    S_a (x) S_b (theorem 1 of the paper). Roots have order 2. All S begin at r I with r the root mean square of the
    first gradient, which counts as one gradient in the average. Without it, directions that the first gradients do not
    excite would have no variance, and their first gradient would be whitened without bound. Before the first refresh,
    rms(G) I replaces S_b.
    """

    name = "kl_shampoo"
    statistics = "second moments of whitened gradients"
    label = "KL"
    p = 2  # inverse square roots of the covariance

    def prior(self, sides: int) -> int:
        """Return 0 if there is only one side, whose statistics are those of Shampoo, or else 1."""
        return int(sides > 1)

    def power(self, sides: int) -> float:
        """Return 2 / sides: the product over all sides has degree 2."""
        return 2.0 / sides

    def observed(self, g: jax.Array, state: PreconditionerState, blocks: Blocks, side: int) -> jax.Array:
        """Return the gradient whitened along the other sides, divided by the square root of their lengths."""
        bucket = blocks.bucket
        others = [number for number, other in enumerate(bucket.sides) if other != side]
        if not others:
            return g
        found = (state.refreshed > 0)[:, None, None]
        # Convert from the units of the roots to those of g.
        power = self.power(len(bucket.sides))
        change = jnp.where(state.refreshed > 0, state.scale_log2 - state.roots_scale_log2, 0)
        change = power_of(power / bucket.p, change)
        start = jnp.maximum(_rms(g, blocks), jnp.finfo(jnp.float32).tiny)[:, None, None] ** (-power / bucket.p)
        factors = []
        for number in others:
            identity = jnp.eye(bucket.shape[bucket.sides[number]], dtype=g.dtype)
            root = power_of_two(change)[:, None, None] * state.roots[number]
            factors.append(jnp.where(found, root, start * identity))
        lengths = math.prod(blocks.sizes[:, bucket.sides[number]].astype(jnp.float32) for number in others)
        x = multiplied(g, factors, [bucket.sides[number] for number in others], bucket.precision.statistics)
        return x / jnp.sqrt(jnp.maximum(lengths, 1)).reshape(-1, *[1] * (g.ndim - 1))

    def first(self, g: jax.Array, blocks: Blocks, side: int) -> jax.Array:
        """Return rms(G)^power I, the statistics of a side at the first gradient."""
        length, power = blocks.bucket.shape[side], self.power(len(blocks.bucket.sides))
        real = jnp.arange(length) < blocks.sizes[:, side, None]
        return (real * _rms(g, blocks)[:, None] ** power)[:, :, None] * jnp.eye(length, dtype=g.dtype)


def _rms(g: jax.Array, blocks: Blocks) -> jax.Array:
    """Return the root mean square [n] of blocks without their padding."""
    elements = jnp.prod(blocks.sizes.astype(jnp.float32), axis=1)
    return jnp.sqrt(jnp.sum(g * g, axis=tuple(range(1, g.ndim))) / jnp.maximum(elements, 1))
