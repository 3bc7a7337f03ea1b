"""Attention over packed rows: grouped queries, whole or by blocks, sharded along `sequence` or not.

Shapes in names: B batch, T queries, S keys, H query heads, K key-value heads, G = H / K, D head_dim, V width
of a value.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from . import layout
from .kernels import attention as kernels
from .kernels.attention import CAUSAL, Pattern

Drop = Callable[[jax.Array], jax.Array]
KeysValues = tuple[jax.Array, jax.Array]
_LEAST_BLOCK = 128  # queries of a block that a short window asks for
_GROUPS = 8  # groups of causal queries, each with a slice of the keys
_MASKED = float(jnp.finfo(jnp.float32).min)  # finite: the difference of two masked scores is 0, not NaN


class Earlier(NamedTuple):
    """Slots of the rows that precede those of the queries, in which keys and values are cached.

    Attributes:
      segments: int32 [B, S], 0 for slots that are empty or padding.
      filled: int32 scalar, number of slots that are no longer empty: the first of the queries' slots.
    """

    segments: jax.Array
    filled: jax.Array


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    key_segments: jax.Array | None = None,
    pattern: Pattern = CAUSAL,
    *,
    block: int = 0,
    kernel: str = "xla",
    zigzag: bool = False,
    sinks: jax.Array | None = None,
    drop: Drop | None = None,
) -> jax.Array:
    """Return softmax(scale q k) v inside segments: query [B, T, H, D], key [B, S, K, D], value [B, S, K, V].

    If the mesh in the context shards the positions, each device keeps its part of the queries and gathers all keys and
    values along `sequence` (Llama 3's context parallelism, arXiv 2407.21783, section 3.3.2). With grouped queries these
    are a small part of a layer's activations, and the gradient is one reduce-scatter. A ring (arXiv 2310.01889) would
    hold 1 / parts of them, at the price of as many dependent exchanges as there are parts.

    Args:
      query: rotated.
      key: rotated.
      value: values to average.
      segments: int32 [B, T], not -1; a query sees only keys of its segment.
      key_segments: int32 [B, S]; by default those of the queries.
      pattern: keys of its segment that a query sees.
      block: queries whose scores a device holds at once, also in the backward pass, which computes them again; 0 for
        all queries, or with a window as many as it has. Blocks of keys that a block of queries does not see are
        skipped. Only XLA needs it.
      kernel: one of `kernels.KERNELS`.
      zigzag: whether queries, keys and their segments are in the order of `layout.zigzag`.
      sinks: as in `attend`.
      drop: function that drops weights [B, K, H / K, T, S]. Only XLA can.

    Raises:
      ValueError: the kernel that was named does not fit.
    """
    key_segments = segments if key_segments is None else key_segments
    _, keys, kv_heads, _ = key.shape
    shape = jax.ShapeDtypeStruct(query.shape, query.dtype)
    asked = {"drops": drop is not None, "sinks": sinks is not None, "value_dim": value.shape[-1]}
    chosen = kernels.choose(kernel, shape, keys, kv_heads, pattern, **asked).kernel
    if chosen == "splash":
        return kernels.splash(query, key, value, segments, key_segments, pattern, sinks=sinks, zigzag=zigzag)
    if chosen == "cudnn":
        return kernels.cudnn(query, key, value, segments, key_segments, pattern)
    query, key, value = (checkpoint_name(x, "qkv") for x in (query, key, value))
    if pattern.window and not block:
        block = max(pattern.window, _LEAST_BLOCK)
        block = block if 2 * block <= keys else 0
    local = functools.partial(_attend_by_blocks, pattern=pattern, block=block, drop=drop)
    if kernels.sequence_parts(query.shape[1], key.shape[1]) == 1 or drop is not None:
        group = query.shape[1]
        if pattern.causal and not pattern.window and 0 < block < group:
            group = -(-group // (_GROUPS * block)) * block
        mixed = _by_groups(local, query, key, value, segments, key_segments, sinks, group)
    else:
        mixed = _on_shards(local, query, key, value, segments, key_segments, sinks, zigzag, pattern.causal)
    return checkpoint_name(mixed, "context")


def attend_with_cache(
    query: jax.Array,
    new: KeysValues,
    cached: KeysValues,
    segments: jax.Array,
    earlier: Earlier,
    pattern: Pattern,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Return attention from a row's next slots to themselves and to the earlier slots of their segment.

    Args:
      query: rotated, [B, T, H, D].
      new: rotated keys, and values, of the same slots, [B, T, K, D].
      cached: those of the earlier slots, [B, S, K, D].
      segments: int32 [B, T], those of the queries.
      earlier: the earlier slots.
      pattern: keys of its segment that a query sees.
      sinks: as in `attend`.
    """
    slots = earlier.filled + jnp.arange(query.shape[1])
    key_slots = jnp.concatenate([jnp.arange(earlier.segments.shape[1]), slots])
    key_segments = jnp.concatenate([earlier.segments, segments], axis=1)
    visible = (segments[:, :, None] == key_segments[:, None, :]) & pattern.sees(slots, key_slots)
    # Two parts: to join them would copy the cache.
    keys, values = zip(cached, new, strict=True)
    return attend(query, keys, values, visible, pattern, sinks)


def _by_groups(local, query, key, value, segments, key_segments, sinks, group: int) -> jax.Array:
    """Attend from each group of queries to the keys up to its end, or to all keys if there is one group."""
    length = query.shape[1]
    if group == length:
        return local(query, key, value, segments, key_segments, sinks, 0)
    key, value = key.astype(jnp.float32), value.astype(jnp.float32)  # their gradients are summed over the groups
    mixed = []
    for start in range(0, length, group):
        here, seen = slice(start, min(start + group, length)), slice(0, min(start + group, length))
        arrays = query[:, here], key[:, seen], value[:, seen], segments[:, here], key_segments[:, seen]
        mixed.append(local(*arrays, sinks, start))
    return jnp.concatenate(mixed, axis=1)


def _on_shards(local, query, key, value, segments, key_segments, sinks, zigzag: bool, causal: bool) -> jax.Array:
    """Attend from each shard of the queries along `sequence` to all keys; early chunks see only the first half."""
    parts = layout.zigzag_parts(query.shape[1]) if zigzag else 1

    def on_device(query, key, value, segments, key_segments, sinks):
        key, value, key_segments = (kernels.gather_positions(x, parts > 1) for x in (key, value, key_segments))
        part, length = lax.axis_index(layout.SEQUENCE_AXIS), query.shape[1]
        if parts == 1:
            return local(query, key, value, segments, key_segments, sinks, part * length)
        chunk, seen = length // 2, slice(0, key.shape[1] // 2 if causal else None)
        early = query[:, :chunk], key[:, seen], value[:, seen], segments[:, :chunk], key_segments[:, seen], sinks
        late = query[:, chunk:], key, value, segments[:, chunk:], key_segments, sinks
        mixed = local(*early, part * chunk), local(*late, (2 * parts - 1 - part) * chunk)
        return jnp.concatenate(mixed, axis=1)

    # Rows are sharded by hand too: the partitioner would gather the gradients of all rows for the reduce-scatter.
    rows = layout.batch_axes(query.shape[0])
    by_position = P(rows, layout.SEQUENCE_AXIS)
    return jax.shard_map(
        on_device,
        axis_names={layout.SEQUENCE_AXIS, *rows},
        in_specs=(*(by_position,) * 5, P()),
        out_specs=by_position,
        check_vma=False,
    )(query, key, value, segments, key_segments, sinks)


def _attend_by_blocks(
    query, key, value, segments, key_segments, sinks, start, *, pattern: Pattern, block: int, drop: Drop | None
) -> jax.Array:
    """Attend to the keys of each query's segment; the first query [B, T, H, D] is at slot `start` of the keys."""
    length, keys = query.shape[1], key.shape[1]

    def attend_from(start, query, segments, first, key, value, key_segments):
        visible = segments[:, :, None] == key_segments[:, None, :]
        visible &= pattern.sees(start + jnp.arange(query.shape[1]), first + jnp.arange(key.shape[1]))
        key, value = key.astype(query.dtype), value.astype(query.dtype)
        return attend(query, [key], [value], visible, pattern, sinks, drop=drop)

    block = min(block, length)
    if not 0 < block < keys:
        return attend_from(start, query, segments, 0, key, value, key_segments)
    # The loop sums the gradients of keys and values over the blocks in their type.
    arrays = key.astype(jnp.float32), value.astype(jnp.float32), key_segments

    def attend_from_block(start, query, segments):
        """Attend to a slice of the keys that has all that the block sees."""
        if not pattern.window:
            return attend_from(start, query, segments, 0, *arrays)
        size = min(keys, pattern.window + block - 1)
        first = jnp.clip(start - pattern.window + 1, 0, keys - size)
        seen = (lax.dynamic_slice_in_dim(x, first, size, axis=1) for x in arrays)
        return attend_from(start, query, segments, first, *seen)

    starts = start + jnp.arange(0, length, block)
    blocks = (starts, _cut(query, block), _cut(segments, block, fill=-1))
    mixed = lax.map(lambda cut: jax.checkpoint(attend_from_block, prevent_cse=False)(*cut), blocks)
    return jnp.moveaxis(mixed, 0, 1).reshape(query.shape[0], -1, *mixed.shape[3:])[:, :length]


def _cut(x: jax.Array, block: int, fill: int = 0) -> jax.Array:
    """Return [B, T, ...] as [T / block, B, block, ...], with T padded to a multiple of the block."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % block)
    x = jnp.pad(x, padding, constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def attend(
    query: jax.Array,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    visible: jax.Array,
    pattern: Pattern = CAUSAL,
    sinks: jax.Array | None = None,
    *,
    drop: Drop | None = None,
) -> jax.Array:
    """Return softmax(scale q k) v: query [B, T, H, D], keys [B, S, K, D], values [B, S, K, V], visible bool [B, T, S].

    Keys and values may come in several parts, [B, S1, K, D], [B, S2, K, D], ... Query head h reads key-value head
    h // (H / K). Scores and softmax are float32, the result has the query's dtype. A query without visible keys gets
    the mean of all values. Axes of size 1 of `visible` are broadcast. Scale and soft cap are those of `pattern`. `drop`
    is applied to the weights [B, K, H / K, T, S].

    `sinks`, float32 [H], are further scores of every query, whose values are 0 (gpt-oss, arXiv 2508.10925).
    """
    batch, length, heads, head_dim = query.shape
    grouped = query.reshape(batch, length, keys[0].shape[2], heads // keys[0].shape[2], head_dim)
    scores = jnp.concatenate(
        [jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32) for key in keys], axis=-1
    )
    scores *= pattern.factor(head_dim)
    if pattern.soft_cap:
        scores = pattern.soft_cap * jnp.tanh(scores / pattern.soft_cap)
    scores = jnp.where(visible[:, None, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    if sinks is not None:
        sinks = sinks.reshape(*grouped.shape[2:4], 1, 1)
        weights *= jax.nn.sigmoid(jax.nn.logsumexp(scores, axis=-1, keepdims=True) - sinks)
    weights = weights.astype(values[0].dtype)
    if drop is not None:
        weights = drop(weights)
    ends = np.cumsum([value.shape[1] for value in values])
    parts = zip(jnp.split(weights, ends[:-1], axis=-1), values, strict=True)
    mixed = (jnp.einsum("bkgts,bskd->btkgd", weights, value) for weights, value in parts)
    return functools.reduce(jnp.add, mixed).reshape(batch, length, heads, -1)
