"""Whether the numbers of a tree are finite, and how large they are.

What is reduced over the leaves goes through a select or an absolute value: a plain conjunction or maximum over a stack
of scalars XLA turns into a chain of n operations that it repeats in every fusion that asks for the result, so that
programs grow with the square of the number of leaves.
"""

from typing import Any

import jax
import jax.numpy as jnp


def all_finite(tree: Any) -> jax.Array:
    """One bool for all leaves; True of none."""
    flags = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    if not flags:
        return jnp.bool_(True)
    last_that_is_not = jnp.max(jnp.where(jnp.stack(flags), 0, jnp.arange(1, len(flags) + 1)))
    return last_that_is_not == 0


def largest(tree: Any) -> jax.Array:
    """The largest absolute value of all leaves, float32; NaN where there is one, 0 of none."""
    maxima = [jnp.max(jnp.abs(leaf.astype(jnp.float32)), initial=0.0) for leaf in jax.tree.leaves(tree)]
    return jnp.max(jnp.abs(jnp.stack(maxima))) if maxima else jnp.float32(0)
