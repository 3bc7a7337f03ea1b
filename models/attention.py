"""Attention by heads, shared by the models. Shapes: B batch, T queries, S keys, H query heads, K key-value heads, D."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    *,
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """softmax(q k / sqrt(D)) v for query [B, T, H, D], key and value [B, S, K, D], visible bool [B, T or 1, S].

    Query head h reads key-value head h // (H / K). Scores and softmax are float32, the result has the query's dtype.
    A query that sees no key reads the mean of all values. `drop` is applied to the weights [B, K, H / K, T, S].
    """
    batch, length, heads, head_dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    if drop is not None:
        weights = drop(weights)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(query.shape)
