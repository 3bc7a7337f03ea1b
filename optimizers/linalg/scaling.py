"""Exact scaling by powers of two."""

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


def exponent_of(x: jax.Array) -> jax.Array:
    """Return the whole e with 2^(e-1) <= |x| < 2^e, int32, as `jnp.frexp` does for normal numbers, and 0 for 0.

    `jnp.frexp` compiles to an order of magnitude more instructions.
    """
    bits = lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.int32)
    return jnp.where(x == 0, 0, (bits >> 23 & 255) - 126)
