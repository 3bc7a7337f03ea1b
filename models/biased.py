"""Parts of encoders with biases, such as BERT and ViT: attention, an MLP with GELU, dense layers, LayerNorm, dropout.

They take their sizes from a task with the fields `embed_dim`, `heads`, `mlp_dim`, `init_std`, `attention` and
`compute_dtype`.

Shapes in names: B batch, T sequence, E embed, H heads, D = E / H, M mlp.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .attention import Pattern, attention
from .modules import partitioned

PATTERN = Pattern(causal=False)


class Attention(nn.Module):
    """Attention to all real slots; kernels [E, H, D] three times and [H, D, E], with biases. Padding sees padding."""

    task: Any
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array, real_BxT: jax.Array) -> jax.Array:
        """Return the update of the residual stream, [B, T, E]; `real_BxT` is 1 for real slots and 0 for padding."""
        task = self.task
        heads = (task.heads, task.embed_dim // task.heads)
        into = functools.partial(dense, task, heads, ("embed",), ("heads", "kv"))
        query, key, value = (into(name=name)(x_BxTxE) for name in ("query", "key", "value"))
        drop = functools.partial(dropped, rate=self.dropout) if self.dropout else None
        mixed_BxTxHxD = attention(query, key, value, real_BxT, pattern=PATTERN, kernel=task.attention, drop=drop)
        out = dense(task, task.embed_dim, ("heads", "kv"), ("embed",), name="out")
        return checkpoint_name(out(mixed_BxTxHxD), "attention_out")


class GeluMLP(nn.Module):
    """gelu(x up) down: kernels [E, M] and [M, E], with biases."""

    task: Any

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array) -> jax.Array:
        """Return the update of the residual stream, [B, T, E]."""
        into = dense(self.task, self.task.mlp_dim, ("embed",), ("mlp",), name="up")
        hidden_BxTxM = checkpoint_name(into(x_BxTxE), "up")
        return dense(self.task, self.task.embed_dim, ("mlp",), ("embed",), name="down")(nn.gelu(hidden_BxTxM))


def dense(
    task: Any,
    features: int | tuple[int, ...],
    inputs: tuple[str | None, ...],
    outputs: tuple[str | None, ...],
    *,
    name: str,
) -> nn.DenseGeneral:
    """Return a dense layer from the last axes, named `inputs`, to axes named `outputs`."""
    return nn.DenseGeneral(
        features,
        axis=tuple(range(-len(inputs), 0)),
        dtype=jnp.dtype(task.compute_dtype),
        kernel_init=partitioned(nn.initializers.truncated_normal(task.init_std), *inputs, *outputs),
        bias_init=partitioned(nn.initializers.zeros_init(), *outputs),
        name=name,
    )


def dropped(x: jax.Array, rate: float) -> jax.Array:
    """Apply dropout; a rate of 0 does nothing."""
    return nn.Dropout(rate, deterministic=False)(x)


def norm(name: str, dtype: jnp.dtype, epsilon: float) -> nn.LayerNorm:
    """Return a LayerNorm, computed in float32, with results of the given type."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        use_fast_variance=False,  # mean of squares - square of mean would lose more precision than epsilon
        scale_init=partitioned(nn.initializers.ones_init(), "norm"),
        bias_init=partitioned(nn.initializers.zeros_init(), "norm"),
        name=name,
    )
