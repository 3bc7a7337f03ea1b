"""Attention kernels: which one fits, JAX's splash attention for TPUs, and cuDNN's for GPUs.

Both compute what `attention.attend` computes for causal attention inside segments, without storing the scores. Shapes
in names: B batch, T queries, S keys, H query heads, K key-value heads, D head_dim.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from . import layout

KERNELS = ("auto", "xla", "splash", "cudnn")
_KERNEL_OF = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}  # ahead of time a GPU is "cuda"
_TENSOR_AXIS = "tensor"  # mesh axis that shards heads
_LANES = 128  # positions and widths of heads are multiples of a TPU register's lanes
_BLOCK = 512  # queries and keys of a block
_LONGEST_FUSED = 8_192  # the fused backward pass stores the queries' gradient once per block of keys


class Choice(NamedTuple):
    """A kernel, "xla", "splash" or "cudnn", and why it was chosen."""

    kernel: str
    why: str


def choose(kernel: str, length: int, head_dim: int, dtype: str) -> Choice:
    """Return the kernel for rows of `length` positions on the mesh in the context.

    Args:
      kernel: one of `KERNELS`; "auto" takes the kernel of the platform if it fits, else "xla".
      length: positions of a row on all devices.
      head_dim: width of a head.
      dtype: type of queries, keys and values.

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
    obstacle = (_splash_obstacle if wanted == "splash" else _cudnn_obstacle)(device, length, head_dim, dtype)
    if not obstacle:
        return Choice(wanted, f"it fits platform {platform}" if kernel == "auto" else "configured")
    if kernel == "auto":
        return Choice("xla", f"{wanted} does not fit: {obstacle}")
    raise ValueError(f"task.attention={kernel!r}: {obstacle}. Use 'auto' or 'xla'")


def _splash_obstacle(device: jax.sharding.AbstractDevice | None, length: int, head_dim: int, dtype: str) -> str:
    """Return why splash attention does not fit, "" if it does."""
    del dtype  # any
    parts = layout.parts(layout.SEQUENCE_AXIS, length)
    if device is None or device.platform not in ("tpu", "cpu"):  # on CPUs it is interpreted, for tests
        return f"it needs a TPU and has platform {device.platform if device else 'none'}"
    if length % (parts * _LANES):
        return f"rows of {length} positions on {parts} devices must be multiples of {parts * _LANES}"
    return f"head_dim={head_dim} must be a multiple of {_LANES}" if head_dim % _LANES else ""


def _cudnn_obstacle(device: jax.sharding.AbstractDevice | None, length: int, head_dim: int, dtype: str) -> str:
    """Return why cuDNN's attention does not fit, "" if it does."""
    if device is None or "NVIDIA" not in device.device_kind:
        return f"it needs an NVIDIA GPU and has {device.device_kind if device else 'no device'}"
    capability = getattr(jax.local_devices()[0], "compute_capability", "8.0")  # ahead of time there is no GPU to ask
    if float(capability) < 8:
        return f"it needs compute capability 8.0 and has {capability}"
    if layout.parts(layout.SEQUENCE_AXIS, length) > 1:
        return "it cannot shard positions along mesh.sequence"
    if dtype != "bfloat16":
        return f"task.compute_dtype={dtype} must be bfloat16"
    if length % 64:
        return f"rows of {length} positions must be multiples of 64"
    return f"head_dim={head_dim} must be a multiple of 8, at most 128" if head_dim % 8 or head_dim > 128 else ""


def splash(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    """Return causal attention inside segments by splash attention: query [B, T, H, D], key and value [B, S, K, D].

    Each device attends from its rows, positions and heads to all keys of its rows and heads. It skips blocks of keys
    that none of its queries sees.
    """
    mesh = jax.sharding.get_abstract_mesh()
    length, heads, head_dim = query.shape[1:]
    specs, tensor = _specs(query, key)
    parts = layout.parts(layout.SEQUENCE_AXIS, length)
    queries, keys = math.gcd(_BLOCK, length // parts), math.gcd(_BLOCK, length)
    fused = parts == 1 and length <= _LONGEST_FUSED
    kernel = splash_attention_kernel.make_splash_mha(
        mask=splash_attention_mask.MultiHeadMask(
            [splash_attention_mask.CausalMask((length, length), shard_count=parts)] * heads
        ),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=queries,
            block_kv=keys,
            block_kv_compute=keys,
            block_q_dkv=queries,
            block_kv_dkv=keys,
            block_kv_dkv_compute=keys,
            block_q_dq=None if fused else queries,
            block_kv_dq=None if fused else keys,
            use_fused_bwd_kernel=fused,
        ),
        head_shards=tensor,
        q_seq_shards=parts,
        residual_checkpoint_name="context",
        interpret=mesh.abstract_device is not None and mesh.abstract_device.platform == "cpu",
    )
    by_position, rows = specs
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, P(by_position[2], by_position[1])))

    def on_device(kernel, query, key, value, segments, all_segments):
        if parts > 1:
            key, value = gather_positions(key), gather_positions(value)
        query = (query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype)
        by_head = (checkpoint_name(jnp.swapaxes(x, 1, 2), "qkv") for x in (query, key, value))
        mixed = jax.vmap(kernel)(*by_head, splash_attention_kernel.SegmentIds(q=segments, kv=all_segments))
        return jnp.swapaxes(mixed, 1, 2)

    return jax.shard_map(
        on_device,
        in_specs=(kernel_spec, by_position, by_position, by_position, P(*by_position[:2]), rows),
        out_specs=by_position,
        check_vma=False,
    )(kernel, query, key, value, segments, segments)


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    """Return causal attention inside segments by cuDNN: query [B, T, H, D], key and value [B, T, K, D], bfloat16.

    The mask of segments takes T x T values of a row in bfloat16.
    """

    def on_device(query, key, value, segments):
        query, key, value = (checkpoint_name(x, "qkv") for x in (query, key, value))
        same = segments[:, None, :, None] == segments[:, None, None, :]
        mixed = jax.nn.dot_product_attention(query, key, value, mask=same, is_causal=True, implementation="cudnn")
        return checkpoint_name(mixed, "context")

    (by_position, rows), _ = _specs(query, key)
    return jax.shard_map(
        on_device, in_specs=(by_position, by_position, by_position, rows), out_specs=by_position, check_vma=False
    )(query, key, value, segments)


def _specs(query: jax.Array, key: jax.Array) -> tuple[tuple[P, P], int]:
    """Return the specs of [B, T, heads, D] and of the rows alone, and the number of shards of the heads."""
    rows = layout.batch_axes(query.shape[0])
    sequence = layout.SEQUENCE_AXIS if layout.parts(layout.SEQUENCE_AXIS, query.shape[1]) > 1 else None
    tensor = layout.parts(_TENSOR_AXIS, key.shape[2])
    return (P(rows, sequence, _TENSOR_AXIS if tensor > 1 else None), P(rows)), tensor


@jax.custom_vjp
def gather_positions(x: jax.Array) -> jax.Array:
    """Gather positions [B, S / parts, ...] along `sequence` to [B, S, ...]."""
    return lax.all_gather(x, layout.SEQUENCE_AXIS, axis=1, tiled=True)


def _gather_forward(x):
    return gather_positions(x), None


def _gather_backward(_, gradient):
    # In float32: a sum over many devices loses bits in bfloat16, and XLA's CPU compiler aborts on it.
    summed = lax.psum_scatter(gradient.astype(jnp.float32), layout.SEQUENCE_AXIS, scatter_dimension=1, tiled=True)
    return (summed.astype(gradient.dtype),)


gather_positions.defvjp(_gather_forward, _gather_backward)
