"""Exact scaling by powers of two, and the largest number of a tree."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def power_of_two(exponent: jax.Array | int | float) -> jax.Array:
    """Return 2^exponent in float32, for exponents clipped to [-126, 127]; exact for whole exponents."""
    exponent = jnp.asarray(exponent)
    if jnp.issubdtype(exponent.dtype, jnp.integer):
        bits = (jnp.clip(exponent, -126, 127).astype(jnp.int32) + 127) << 23
        return lax.bitcast_convert_type(bits, jnp.float32)
    whole = jnp.floor(exponent)
    return power_of_two(whole.astype(jnp.int32)) * jnp.exp2((exponent - whole).astype(jnp.float32))


def power_of(factor: float, exponent: jax.Array | int) -> jax.Array:
    """Return the binary exponent of (2^exponent)^factor: an integer if the factor is whole, else float32."""
    if factor == int(factor):
        return jnp.asarray(exponent) * int(factor)
    return jnp.asarray(exponent, jnp.float32) * factor


def exponent_of(x: jax.Array) -> jax.Array:
    """Return the whole e with 2^(e-1) <= |x| < 2^e, int32, as `jnp.frexp` does for normal numbers, and 0 for 0.

    `jnp.frexp` compiles to an order of magnitude more instructions.
    """
    bits = lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.int32)
    return jnp.where(x == 0, 0, (bits >> 23 & 255) - 126)


def all_finite(tree: Any) -> jax.Array:
    """Return whether all numbers of all leaves are finite; True without leaves."""
    return jnp.isfinite(largest(tree))


def largest(tree: Any) -> jax.Array:
    """Return the largest absolute value of all leaves, float32; infinity if any is NaN, 0 without elements."""
    # `max` over n stacked scalars becomes a chain of n operations that XLA duplicates into every consumer, so that code
    # grows as n^2. The absolute value after the stack prevents that.
    maxima = [_largest(leaf) for leaf in jax.tree.leaves(tree) if leaf.size]
    return jnp.max(jnp.abs(jnp.stack(maxima))) if maxima else jnp.float32(0)


def _largest(x: jax.Array) -> jax.Array:
    # The maximum over devices may drop a NaN.
    x = jnp.abs(x).astype(jnp.float32)
    return jnp.max(jnp.where(jnp.isnan(x), jnp.inf, x))
