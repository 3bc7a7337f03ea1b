"""The cache of keys and values, or of their latents, with which texts are continued: from prompts, and token by token.

Shapes in names: B batch, T slots of the prompts, S slots of the cache, K key-value heads, D head_dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..attention import KeysValues
from ..layout import TENSOR_AXIS, shard_batch

Inputs = tuple[jax.Array, jax.Array, jax.Array]  # tokens, segments and positions
Kept = KeysValues | jax.Array  # what attention keeps of each token: keys and values, or latents as of one head
Layers = dict[str, Kept]


class Cache(NamedTuple):
    """The slots of a batch of rows whose continuation is generated.

    Attributes:
      layers: rotated keys and values, or latents, each [L, B, S, K, D], by the name of the stack of layers.
      segments: int32 [B, S], 1 for tokens, 0 for padding and empty slots.
      positions: int32 [B], number of tokens of each row; a row without tokens is ignored.
      filled: int32 scalar, number of slots that are no longer empty, the same for all rows.
    """

    layers: Layers
    segments: jax.Array
    positions: jax.Array
    filled: jax.Array


def of_prompts(tokens_BxT: jax.Array, real_BxT: jax.Array) -> tuple[Inputs, Cache]:
    """Return the inputs of the model for prompts, and a cache without slots; see `Generating.prefill`."""
    length = real_BxT.shape[1]
    # Rows end in the last slot, so that all continue in the same one, and slots are as far apart as positions.
    behind_B = jnp.argmax(real_BxT[:, ::-1], axis=1)
    order_BxT = (jnp.arange(length) - behind_B[:, None]) % length
    tokens_BxT, real_BxT = (jnp.take_along_axis(x, order_BxT, axis=1) for x in (tokens_BxT, real_BxT))
    positions_B = real_BxT.sum(axis=1, dtype=jnp.int32)
    positions_BxT = jnp.maximum(jnp.arange(length) - (length - positions_B[:, None]), 0)
    empty_BxS = jnp.zeros((len(tokens_BxT), 0), jnp.int32)
    return (tokens_BxT, real_BxT.astype(jnp.int32), positions_BxT), Cache({}, empty_BxS, positions_B, jnp.int32(length))


def with_prompts(cache: Cache, segments_BxT: jax.Array, layers: Layers, slots: int) -> Cache:
    """Return a cache of `slots` slots that begins with the keys and values of the prompts, [L, B, T, K, D]."""
    length = segments_BxT.shape[1]

    def widened(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, slots - length if each == axis else 0) for each in range(x.ndim)])

    layers = jax.tree.map(lambda x: _sharded(widened(x, 2)), layers)
    return cache._replace(layers=layers, segments=widened(segments_BxT, 1))


def of_tokens(tokens_B: jax.Array, cache: Cache) -> Inputs:
    """Return the inputs of the model for the next token of each row."""
    return tokens_B[:, None], (cache.positions > 0).astype(jnp.int32)[:, None], cache.positions[:, None]


def with_tokens(cache: Cache, segments_Bx1: jax.Array, layers: Layers) -> Cache:
    """Return the cache with the keys and values of the next token of each row, [L, B, 1, K, D], in its next slot."""

    def written(old: jax.Array, now: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, now, cache.filled, axis)

    return Cache(
        jax.tree.map(lambda old, now: _sharded(written(old, now, 2)), cache.layers, layers),
        written(cache.segments, segments_Bx1, 1),
        cache.positions + segments_Bx1[:, 0],
        cache.filled + 1,
    )


def _sharded(stack: jax.Array) -> jax.Array:
    """Shard cached keys or values [L, B, S, K, D] by rows and heads."""
    return jax.vmap(lambda x: shard_batch(x, None, TENSOR_AXIS))(stack)
