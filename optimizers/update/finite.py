"""Compute the largest number of a tree, and whether all numbers are finite.

XLA turns `all` or `max` over n stacked scalars into a chain of n operations and duplicates it into every consumer, so
that code grows as n^2. The absolute value after the stack prevents that fusion.
"""

from typing import Any

import jax
import jax.numpy as jnp


def all_finite(tree: Any) -> jax.Array:
    """Return whether all numbers of all leaves are finite; True without leaves."""
    return jnp.isfinite(largest(tree))


def largest(tree: Any) -> jax.Array:
    """Return the largest absolute value of all leaves, float32; infinity if any is NaN, 0 without elements."""
    maxima = [_largest(leaf) for leaf in jax.tree.leaves(tree) if leaf.size]
    return jnp.max(jnp.abs(jnp.stack(maxima))) if maxima else jnp.float32(0)


def _largest(x: jax.Array) -> jax.Array:
    # The maximum over devices may drop a NaN.
    x = jnp.abs(x).astype(jnp.float32)
    return jnp.max(jnp.where(jnp.isnan(x), jnp.inf, x))
