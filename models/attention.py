"""Attention and rotary positions.

Shapes in names: B batch, T queries, S keys, H query heads, K key-value heads, G = H / K, D head_dim.
"""

import jax
import jax.numpy as jnp

Rotation = tuple[jax.Array, jax.Array]


def attend(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(D)) v for query [B, T, H, D], key and value [B, S, K, D], visible bool [B, T, S].

    Query head h reads key-value head h // (H / K). Scores and softmax are float32, the result has the query's dtype.
    Every query must see at least one key.
    """
    batch, length, heads, head_dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(query.shape)


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> Rotation:
    """Cosines and sines, float32 [B, T, 1, head_dim / 2], for positions [B, T] (RoFormer, arXiv 2104.09864)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Turn the pairs (x[i], x[i + D/2]) of x [B, T, heads, D] by their position's angles; computed in float32."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
