"""Attention over packed rows: rotary positions, grouped queries, whole or by blocks, sharded along `sequence` or not.

Shapes in names: B batch, T queries, S keys, H query heads, K key-value heads, G = H / K, D head_dim. Slot t of a row
attends to the slots up to t of its own segment.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from . import kernels, layout

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


def self_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, block: int, kernel: str = "xla"
) -> jax.Array:
    """Return softmax(q k / sqrt(D)) v: query [B, T, H, D], key and value [B, T, K, D], segments [B, T].

    If the mesh in the context shards the positions, each device keeps its part of the queries and gathers all keys and
    values along `sequence` (Llama 3's context parallelism, arXiv 2407.21783, section 3.3.2). With grouped queries these
    are a small part of a layer's activations, and the gradient is one reduce-scatter. A ring (arXiv 2310.01889) would
    hold 1 / parts of them, at the price of as many dependent exchanges as there are parts.

    Args:
      query: rotated.
      key: rotated.
      value: values to average.
      segments: int32, not -1; slots of different segments do not see each other.
      block: queries whose scores a device holds at once, also in the backward pass, which computes them again; 0 for
        all queries. Only XLA needs it.
      kernel: one of `kernels.KERNELS`.

    Raises:
      ValueError: the kernel that was named does not fit.
    """
    chosen = kernels.choose(kernel, query.shape[1], query.shape[-1], str(query.dtype)).kernel
    if chosen != "xla":
        return (kernels.splash if chosen == "splash" else kernels.cudnn)(query, key, value, segments)
    query, key, value = (checkpoint_name(x, "qkv") for x in (query, key, value))
    return checkpoint_name(_by_xla(query, key, value, segments, block), "context")


def _by_xla(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, block: int) -> jax.Array:
    local = functools.partial(_causal, block=block)
    if layout.parts(layout.SEQUENCE_AXIS, query.shape[1]) == 1:
        return local(query, key, value, segments, segments, jnp.zeros((), jnp.int32))

    def on_device(query, key, value, segments, all_segments):
        start = lax.axis_index(layout.SEQUENCE_AXIS) * query.shape[1]
        return local(
            query, kernels.gather_positions(key), kernels.gather_positions(value), segments, all_segments, start
        )

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


def _causal(query, key, value, segments, key_segments, start, *, block: int) -> jax.Array:
    """Attend to the keys up to each query's slot; the first query [B, T, H, D] is at slot `start` of the keys."""

    def attend_from(start, query, segments):
        slots = start + jnp.arange(query.shape[1])
        visible = slots[:, None] >= jnp.arange(key.shape[1])
        visible &= segments[:, :, None] == key_segments[:, None, :]
        return attend(query, key.astype(query.dtype), value.astype(query.dtype), visible)

    length = query.shape[1]
    if not 0 < block < length:
        return attend_from(start, query, segments)
    # The loop sums the gradients of keys and values over the blocks in their type.
    key, value = key.astype(jnp.float32), value.astype(jnp.float32)
    starts = start + jnp.arange(0, length, block)
    blocks = (starts, _cut(query, block), _cut(segments, block, fill=-1))
    mixed = lax.map(lambda cut: jax.checkpoint(attend_from, prevent_cse=False)(*cut), blocks)
    return jnp.moveaxis(mixed, 0, 1).reshape(query.shape[0], -1, *query.shape[2:])[:, :length]


def _cut(x: jax.Array, block: int, fill: int = 0) -> jax.Array:
    """Return [B, T, ...] as [T / block, B, block, ...], with T padded to a multiple of the block."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % block)
    x = jnp.pad(x, padding, constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    *,
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Return softmax(q k / sqrt(D)) v: query [B, T, H, D], key and value [B, S, K, D], visible bool [B, T, S].

    Query head h reads key-value head h // (H / K). Scores and softmax are float32, the result has the query's dtype.
    A query without visible keys gets the mean of all values. Axes of size 1 of `visible` are broadcast. `drop` is
    applied to the weights [B, K, H / K, T, S].
    """
    batch, length, heads, head_dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32) * head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, _MASKED), axis=-1).astype(value.dtype)
    if drop is not None:
        weights = drop(weights)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(query.shape)
