"""Attention kernels: which one fits, JAX's splash attention for TPUs, and cuDNN's for GPUs.

Both compute what `attention.attend` computes, without storing the scores. Shapes in names: B batch, T queries, S keys,
H query heads, K key-value heads, D head_dim. Values may have another width than keys.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from .. import layout
from . import costs

KERNELS = ("auto", "xla", "splash", "cudnn")
_KERNEL_OF = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}  # ahead of time a GPU is "cuda"
_LANES = 128  # positions are multiples of a TPU register's lanes
_BLOCK = 512  # queries and keys of a block; larger ones waste more at the diagonal
_LONG = 8_192  # rows above it have blocks twice as large, and the diagonal is a small part of them


class Pattern(NamedTuple):
    """Which keys of its segment a query sees, and how scores are computed.

    Attributes:
      causal: whether a query sees only the slots up to its own.
      window: number of the last slots that a causal query sees, with its own; 0 for all.
      soft_cap: scores s become soft_cap * tanh(s / soft_cap) (Gemma 2, arXiv 2408.00118, section 2); 0 for no limit.
      scale: factor of q k; 0 for 1 / sqrt(head_dim).
    """

    causal: bool = True
    window: int = 0
    soft_cap: float = 0.0
    scale: float = 0.0

    def factor(self, head_dim: int) -> float:
        """Return the factor of q k."""
        return self.scale or head_dim**-0.5

    def sees(self, slots: jax.Array, key_slots: jax.Array) -> jax.Array:
        """Return which keys the queries see inside a segment, bool [T, S] or, if all do, [1, 1]."""
        if not self.causal:
            return jnp.ones((1, 1), bool)
        seen = slots[:, None] >= key_slots
        return seen & (slots[:, None] - key_slots < self.window) if self.window else seen


CAUSAL = Pattern()


class Choice(NamedTuple):
    """A kernel, "xla", "splash" or "cudnn", and why it was chosen."""

    kernel: str
    why: str


def choose(
    kernel: str,
    query: jax.ShapeDtypeStruct,
    keys: int,
    kv_heads: int,
    pattern: Pattern,
    *,
    drops: bool = False,
    sinks: bool = False,
    value_dim: int = 0,
) -> Choice:
    """Return the kernel for attention on the mesh in the context.

    Args:
      kernel: one of `KERNELS`; "auto" takes the kernel of the platform if it fits, else "xla".
      query: shape [B, T, H, D] on all devices, and type.
      keys: number S of keys of a row on all devices.
      kv_heads: number of key-value heads.
      pattern: of the keys that are seen.
      drops: whether weights are dropped.
      sinks: whether the softmax has sinks.
      value_dim: width of a value; 0 for D.

    Raises:
      ValueError: the kernel that was named does not fit.
    """
    if kernel == "xla":
        return Choice("xla", "configured")
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device else "none"
    if kernel == "auto" and platform not in _KERNEL_OF:
        return Choice("xla", f"there is no kernel for platform {platform}")
    wanted = _KERNEL_OF[platform] if kernel == "auto" else kernel
    if drops:
        obstacle = "it cannot drop weights, as task.dropout above 0 does"
    elif sinks and wanted == "cudnn":
        obstacle = "it has no sinks, and task.attention_sinks=True"
    elif wanted == "splash":
        obstacle = _splash_obstacle(device, query, keys, value_dim)
    elif value_dim not in (0, query.shape[-1]):
        obstacle = f"its values have the width of its keys, and these have {value_dim} and {query.shape[-1]}"
    else:
        obstacle = _cudnn_obstacle(device, query, keys, kv_heads, pattern)
    if not obstacle:
        return Choice(wanted, f"it fits platform {platform}" if kernel == "auto" else "configured")
    if kernel == "auto":
        return Choice("xla", f"{wanted} does not fit: {obstacle}")
    raise ValueError(f"task.attention={kernel!r}: {obstacle}. Use 'auto' or 'xla'")


def _splash_obstacle(
    device: jax.sharding.AbstractDevice | None, query: jax.ShapeDtypeStruct, keys: int, value_dim: int
) -> str:
    """Return why splash attention does not fit, "" if it does."""
    if device is None or device.platform not in ("tpu", "cpu"):  # on CPUs it is interpreted, for tests
        return f"it needs a TPU and has platform {device.platform if device else 'none'}"
    parts = sequence_parts(query.shape[1], keys)
    for length in (query.shape[1], keys):
        if length % (parts * _LANES):
            return f"rows of {length} positions on {parts} devices must be multiples of {parts * _LANES}"
    widths = [width for width in (query.shape[3], value_dim) if width % 64]
    return f"head_dim={widths[0]} must be a multiple of 64" if widths else ""


def _cudnn_obstacle(
    device: jax.sharding.AbstractDevice | None, query: jax.ShapeDtypeStruct, keys: int, kv_heads: int, pattern: Pattern
) -> str:
    """Return why cuDNN's attention does not fit, "" if it does."""
    if device is None or "NVIDIA" not in device.device_kind:
        return f"it needs an NVIDIA GPU and has {device.device_kind if device else 'no device'}"
    capability = getattr(jax.local_devices()[0], "compute_capability", "8.0")  # ahead of time there is no GPU to ask
    if float(capability) < 8:
        return f"it needs compute capability 8.0 and has {capability}"
    batch, length, _, head_dim = query.shape
    if sequence_parts(length, keys) > 1:
        return "it cannot shard positions along mesh.sequence"
    if pattern.soft_cap:
        return f"it has no soft cap of scores, and soft_cap={pattern.soft_cap:g}"
    if query.dtype != jnp.bfloat16:
        return f"task.compute_dtype={query.dtype} must be bfloat16"
    if length % 64 or keys % 64:
        return f"rows of {length if length % 64 else keys} positions must be multiples of 64"
    if head_dim % 8 or head_dim > 128:
        return f"head_dim={head_dim} must be a multiple of 8, at most 128"
    # JAX checks the version of cuDNN, and what else that version needs, when it traces.
    key = jax.ShapeDtypeStruct((batch, keys, kv_heads, head_dim), query.dtype)
    mask = jax.ShapeDtypeStruct((batch, 1, length, keys), jnp.bool)

    def total(query, key, value, mask):
        return _by_cudnn(query, key, value, mask, pattern).astype(jnp.float32).sum()

    try:
        jax.eval_shape(jax.grad(total, argnums=(0, 1, 2)), query, key, key, mask)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return f"JAX says {' '.join(str(error).split())!r}"
    return ""


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    key_segments: jax.Array,
    pattern: Pattern,
    *,
    sinks: jax.Array | None = None,
    zigzag: bool = False,
) -> jax.Array:
    """Return attention inside segments by splash attention; see `attention.attention`.

    Each device attends from its rows, positions and heads to all keys of its rows and heads. It skips blocks of keys
    that none of its queries sees.
    """
    # Importing Pallas takes 60 ms, which a run on a CPU need not wait for.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mesh = jax.sharding.get_abstract_mesh()
    (length, heads, head_dim), keys = query.shape[1:], key.shape[1]
    parts, specs, tensor = sequence_parts(length, keys), *_specs(query, key)
    zigzag = zigzag and layout.zigzag_parts(length) > 1
    chunk = length // (2 * parts if zigzag and length % (2 * parts * _LANES) == 0 else parts)
    block = 2 * _BLOCK if keys > _LONG else _BLOCK
    size, key_size, computed = math.gcd(block, chunk), math.gcd(block, keys), math.gcd(_BLOCK, keys)
    fused = parts == 1 and keys <= _LONG  # it stores the queries' gradient once per block of keys
    if pattern.causal:
        shape = length, keys
        mask = masks.LocalMask(shape, (pattern.window - 1, 0), 0) if pattern.window else masks.CausalMask(shape)
        if zigzag:
            mask.q_sequence = layout.zigzag_order(length, parts)
        mask_parts = parts
        slowest = mask.q_sequence.reshape(parts, -1)[-1]
    else:  # all parts have the same mask, which splash attention cannot cut
        mask, mask_parts = masks.FullMask((length // parts, keys)), 1
        slowest = np.arange(length // parts)
    share = costs.visited(slowest, size, key_size, keys, causal=pattern.causal, window=pattern.window)
    visits = f"visits_{share:.6f}"  # for `costs.cost`
    kernel = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=size,
            block_kv=key_size,
            block_kv_compute=computed,
            block_q_dkv=size,
            block_kv_dkv=key_size,
            block_kv_dkv_compute=computed,
            block_q_dq=None if fused else size,
            block_kv_dq=None if fused else key_size,
            use_fused_bwd_kernel=fused,
        ),
        attn_logits_soft_cap=pattern.soft_cap or None,
        head_shards=tensor,
        q_seq_shards=mask_parts,
        residual_checkpoint_name="context",
        interpret=mesh.abstract_device is not None and mesh.abstract_device.platform == "cpu",
    )
    by_position, rows = specs
    mask_spec = P(by_position[2], by_position[1] if mask_parts > 1 else None)
    # A mesh without axes that a `shard_map` in the context shards already: the kernel asks it only for sizes.
    whole = jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names)
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(whole, mask_spec))

    def on_device(kernel, query, key, value, segments, key_segments, sinks):
        if parts > 1:
            key, value, key_segments = (gather_positions(x, zigzag) for x in (key, value, key_segments))
        query = (query.astype(jnp.float32) * pattern.factor(head_dim)).astype(query.dtype)
        by_head = (checkpoint_name(jnp.swapaxes(x, 1, 2), "qkv") for x in (query, key, value))
        with jax.named_scope(visits):
            of_rows = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
            mixed = of_rows(*by_head, kernels.SegmentIds(q=segments, kv=key_segments), sinks)
        return jnp.swapaxes(mixed, 1, 2)

    return jax.shard_map(
        on_device,
        in_specs=(kernel_spec, by_position, by_position, by_position, rows, rows, P(by_position[2])),
        out_specs=by_position,
        check_vma=False,
    )(kernel, query, key, value, segments, key_segments, sinks)


def cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    key_segments: jax.Array,
    pattern: Pattern,
) -> jax.Array:
    """Return attention inside segments by cuDNN, in bfloat16; see `attention.attention`.

    The mask of segments and of the window takes T x S values of a row in bfloat16.
    """

    def on_device(query, key, value, segments, key_segments):
        query, key, value = (checkpoint_name(x, "qkv") for x in (query, key, value))
        visible = segments[:, :, None] == key_segments[:, None, :]
        visible &= pattern.sees(jnp.arange(query.shape[1]), jnp.arange(key.shape[1]))
        with jax.named_scope(visits):
            mixed = _by_cudnn(query, key, value, visible[:, None], pattern)
        return checkpoint_name(mixed, "context")

    length, keys = query.shape[1], key.shape[1]
    visits = f"visits_{costs.visited(np.arange(length), 64, 64, keys, causal=pattern.causal):.6f}"
    (by_position, rows), _ = _specs(query, key)
    return jax.shard_map(
        on_device, in_specs=(by_position, by_position, by_position, rows, rows), out_specs=by_position, check_vma=False
    )(query, key, value, segments, key_segments)


def _by_cudnn(query, key, value, mask, pattern: Pattern) -> jax.Array:
    # With is_causal cuDNN computes no block of scores that no query sees.
    scale = pattern.factor(query.shape[-1])
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, scale=scale, is_causal=pattern.causal, implementation="cudnn"
    )


def sequence_parts(length: int, keys: int) -> int:
    """Return the number of shards along `sequence` of queries and keys; 1 if it does not divide both."""
    return min(layout.parts(layout.SEQUENCE_AXIS, length), layout.parts(layout.SEQUENCE_AXIS, keys))


def _specs(query: jax.Array, key: jax.Array) -> tuple[tuple[P, P], int]:
    """Return the specs of [B, T, heads, D] and of [B, T], and the number of shards of the heads."""
    rows = layout.batch_axes(query.shape[0])
    sequence = layout.SEQUENCE_AXIS if sequence_parts(query.shape[1], key.shape[1]) > 1 else None
    tensor = layout.parts(layout.TENSOR_AXIS, key.shape[2])
    return (P(rows, sequence, layout.TENSOR_AXIS if tensor > 1 else None), P(rows, sequence)), tensor


def gather_positions(x: jax.Array, zigzag: bool) -> jax.Array:
    """Gather [B, S / P, ...] along `sequence` to [B, S, ...] in natural order, from that of `layout.zigzag` or not."""
    rows, parts = x.shape[0], lax.axis_size(layout.SEQUENCE_AXIS)
    chunks = x.reshape(rows, 2 if zigzag else 1, -1, *x.shape[2:])
    if zigzag:
        # Part p has the chunks p and 2 P - 1 - p. With p and P + p, the gathered chunks are in order.
        mirror = [(part, parts - 1 - part) for part in range(parts)]
        chunks = jnp.stack([chunks[:, 0], lax.ppermute(chunks[:, 1], layout.SEQUENCE_AXIS, mirror)], axis=1)
    gather = _all_gather if jnp.issubdtype(x.dtype, jnp.integer) else _gather
    return gather(chunks).reshape(rows, -1, *x.shape[2:])


def _all_gather(chunks: jax.Array) -> jax.Array:
    return lax.all_gather(chunks, layout.SEQUENCE_AXIS, axis=2, tiled=True)


_gather = jax.custom_vjp(_all_gather)


def _gather_forward(chunks):
    return _gather(chunks), None


def _gather_backward(_, gradient):
    # In float32: a sum over many devices loses bits in bfloat16, and XLA's CPU compiler aborts on it. The parts are the
    # major of three dimensions: along another one, or with a layout of its choice, a TPU reduces to all devices.
    parts = lax.axis_size(layout.SEQUENCE_AXIS)
    cut = jnp.moveaxis(gradient.reshape(*gradient.shape[:2], parts, -1, *gradient.shape[3:]), 2, 0)
    flat = cut.astype(jnp.float32).reshape(parts, -1, gradient.shape[-1])
    summed = lax.psum_scatter(flat, layout.SEQUENCE_AXIS, scatter_dimension=0)
    return (summed.reshape(cut.shape[1:]).astype(gradient.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)
