"""Attention over packed rows: rotary positions, grouped queries, whole or by blocks, sharded along `sequence` or not.

Shapes in names: B batch, T queries, S keys, H query heads, K key-value heads, G = H / K, D head_dim. Slot t of a row
attends to the slots up to t of its own segment.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from . import layout

Rotation = tuple[jax.Array, jax.Array]
_MASKED = float(jnp.finfo(jnp.float32).min)  # finite: the difference of two masked scores is 0, not NaN


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> Rotation:
    """Return cosines and sines, float32 [B, T, 1, head_dim / 2], for positions [B, T] (RoFormer, arXiv 2104.09864)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotate the pairs (x[i], x[i + D/2]) of x [B, T, heads, D] by the angles of their positions, in float32."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def self_attention(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, block: int) -> jax.Array:
    """Return softmax(q k / sqrt(D)) v: query [B, T, H, D], key and value [B, T, K, D], segments [B, T].

    If the mesh in the context shards the positions, each device keeps its part of the queries and gathers all keys and
    values along `sequence` (Llama 3's context parallelism, arXiv 2407.21783, section 3.3.2). With grouped queries these
    are a small part of a layer's activations, and the gradient is one reduce-scatter. A ring (arXiv 2310.01889) would
    hold 1 / parts of them, at the price of as many dependent exchanges as there are parts.

    Args:
      query: rotated.
      key: rotated.
      value: values to average.
      segments: int32; slots of different segments do not see each other.
      block: keys whose scores a device holds at once; 0 for all keys.
    """
    local = functools.partial(attend_by_blocks, block=block) if block else _attend_whole
    parts = layout.sequence_parts(query.shape[1])
    if parts == 1:
        return local(query, key, value, segments, segments, jnp.zeros((), jnp.int32))

    def on_device(query, key, value, segments, all_segments):
        start = lax.axis_index(layout.SEQUENCE_AXIS) * query.shape[1]
        return local(query, _gather(key), _gather(value), segments, all_segments, start)

    # Rows are sharded by hand too: the partitioner would gather the gradients of all rows for the reduce-scatter.
    rows = layout.batch_axes(query.shape[0])
    by_position = P(rows, layout.SEQUENCE_AXIS)
    return jax.shard_map(
        on_device,
        axis_names={layout.SEQUENCE_AXIS, *rows},
        in_specs=(by_position, by_position, by_position, by_position, P(rows)),
        out_specs=by_position,
        check_vma=False,
    )(query, key, value, segments, segments)


@jax.custom_vjp
def _gather(x: jax.Array) -> jax.Array:
    """Gather positions [B, S / parts, ...] along `sequence` to [B, S, ...]."""
    return lax.all_gather(x, layout.SEQUENCE_AXIS, axis=1, tiled=True)


def _gather_forward(x):
    return _gather(x), None


def _gather_backward(_, gradient):
    # In float32: a sum over many devices loses bits in bfloat16, and XLA's CPU compiler aborts on it.
    summed = lax.psum_scatter(gradient.astype(jnp.float32), layout.SEQUENCE_AXIS, scatter_dimension=1, tiled=True)
    return (summed.astype(gradient.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    *,
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Return softmax(q k / sqrt(D)) v: query [B, T, H, D], key and value [B, S, K, D], visible bool [B, T or 1, S].

    Query head h reads key-value head h // (H / K). Scores and softmax are float32, the result has the query's dtype.
    A query without visible keys gets the mean of all values. `drop` is applied to the weights [B, K, H / K, T, S].
    """
    scores = _scores(_grouped(query, key), key, visible)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    if drop is not None:
        weights = drop(weights)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(query.shape)


def attend_by_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    start: jax.Array,
    *,
    block: int,
) -> jax.Array:
    """Compute `attend` in memory linear in S: block by block of keys, by an online softmax (arXiv 2112.05682).

    The backward pass keeps the result and the logarithm of the softmax's denominator, and recomputes the scores of each
    block (FlashAttention, arXiv 2205.14135, appendix B).

    Args:
      query: [B, T, H, D].
      key: [B, S, K, D].
      value: [B, S, K, D].
      query_segments: int32 [B, T], not -1.
      key_segments: int32 [B, S].
      start: int32 scalar, slot of the first query among the keys.
      block: number of keys in a block; the last block may be shorter.
    """
    block = min(block, key.shape[1])
    short = -key.shape[1] % block
    key, value = (jnp.pad(x, ((0, 0), (0, short), (0, 0), (0, 0))) for x in (key, value))
    key_segments = jnp.pad(key_segments, ((0, 0), (0, short)), constant_values=-1)  # no query is in segment -1
    mixed: jax.Array = _by_blocks(block, _grouped(query, key), key, value, query_segments, key_segments, start)
    return mixed.reshape(query.shape)


def _attend_whole(query, key, value, query_segments, key_segments, start):
    return attend(query, key, value, _visible(query_segments, key_segments, start, 0))


def _visible(query_segments: jax.Array, key_segments: jax.Array, query_start: jax.Array, key_start) -> jax.Array:
    """Return which keys a query attends to, bool [B, T, S]: itself and earlier ones of its segment."""
    queries = jnp.arange(query_segments.shape[1]) + query_start
    keys = jnp.arange(key_segments.shape[1]) + key_start
    return (queries[:, None] >= keys[None, :]) & (query_segments[:, :, None] == key_segments[:, None, :])


def _grouped(query: jax.Array, key: jax.Array) -> jax.Array:
    batch, length, heads, head_dim = query.shape
    return query.reshape(batch, length, key.shape[2], heads // key.shape[2], head_dim)


def _scores(query: jax.Array, key: jax.Array, visible: jax.Array) -> jax.Array:
    """Return scores, float32 [B, K, G, T, S], of grouped queries [B, T, K, G, D]."""
    scores = jnp.einsum("btkgd,bskd->bkgts", query, key, preferred_element_type=jnp.float32)
    return jnp.where(visible[:, None, None], scores * query.shape[-1] ** -0.5, _MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_blocks(block, query, key, value, query_segments, key_segments, start):
    return _forward(block, query, key, value, query_segments, key_segments, start)[0]


def _forward(block, query, key, value, query_segments, key_segments, start):
    """Return the result [B, T, K, G, D] and the residuals of the backward pass."""

    def add(carry, cut):
        highest, total, mixed = carry
        key_block, value_block, segments_block, first = cut
        scores = _scores(query, key_block, _visible(query_segments, segments_block, start, first))
        new = jnp.maximum(highest, scores.max(axis=-1))
        weights = jnp.exp(scores - new[..., None])
        # Sums over masked keys before the first visible one vanish: exp(_MASKED - score) is 0.
        kept = jnp.exp(highest - new)
        mixed = mixed * kept[..., None] + jnp.einsum(
            "bkgts,bskd->bkgtd", weights.astype(value.dtype), value_block, preferred_element_type=jnp.float32
        )
        return (new, total * kept + weights.sum(axis=-1), mixed), None

    batch, length, kv_heads, group, head_dim = query.shape
    rows = (batch, kv_heads, group, length)
    begin = (jnp.full(rows, _MASKED), jnp.zeros(rows), jnp.zeros((*rows, head_dim)))
    # Masks do not depend on the layer: a scan over layers would compute them ahead for all blocks and keep them, T x S
    # per head. Values inside a checkpoint are not kept.
    add = jax.checkpoint(add, prevent_cse=False)
    (highest, total, mixed), _ = lax.scan(add, begin, _cut(block, key, value, key_segments))
    result = jnp.moveaxis(mixed / total[..., None], 3, 1).astype(query.dtype)
    return result, (query, key, value, query_segments, key_segments, start, result, highest + jnp.log(total))


def _backward(block, saved, gradient):
    query, key, value, query_segments, key_segments, start, result, logsumexp = saved
    shared = jnp.einsum("btkgd,btkgd->bkgt", gradient, result, preferred_element_type=jnp.float32)

    def add(query_gradient, cut):
        key_block, value_block, segments_block, first = cut
        scores = _scores(query, key_block, _visible(query_segments, segments_block, start, first))
        weights = jnp.exp(scores - logsumexp[..., None])
        of_weights = jnp.einsum("btkgd,bskd->bkgts", gradient, value_block, preferred_element_type=jnp.float32)
        of_scores = weights * (of_weights - shared[..., None]) * query.shape[-1] ** -0.5
        of_scores, weights = of_scores.astype(query.dtype), weights.astype(query.dtype)
        query_gradient += jnp.einsum("bkgts,bskd->btkgd", of_scores, key_block, preferred_element_type=jnp.float32)
        key_gradient = jnp.einsum("bkgts,btkgd->bskd", of_scores, query, preferred_element_type=jnp.float32)
        value_gradient = jnp.einsum("bkgts,btkgd->bskd", weights, gradient, preferred_element_type=jnp.float32)
        return query_gradient, (key_gradient.astype(key.dtype), value_gradient.astype(value.dtype))

    begin = jnp.zeros(query.shape, jnp.float32)
    query_gradient, by_block = lax.scan(add, begin, _cut(block, key, value, key_segments))
    key_gradient, value_gradient = (jnp.moveaxis(x, 0, 1).reshape(key.shape) for x in by_block)
    return query_gradient.astype(query.dtype), key_gradient, value_gradient, None, None, None


_by_blocks.defvjp(_forward, _backward)


def _cut(block: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Return arrays [B, S, ...] as [S / block, B, block, ...], and the slot of each block's first key."""
    count = arrays[0].shape[1] // block
    cut = (jnp.moveaxis(x.reshape(x.shape[0], count, block, *x.shape[2:]), 1, 0) for x in arrays)
    return (*cut, jnp.arange(count) * block)
