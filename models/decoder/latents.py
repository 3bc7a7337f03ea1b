"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values of a small latent.

Keys and values of all heads are products of a normed latent of each token. Further dimensions of queries and keys are
rotated; those of the keys come from the token itself and are the same for all heads. A cache keeps the latent and the
rotated key of a token, and no head's keys or values. Heads attend to latents of a cache: queries are multiplied by the
matrix that makes keys, and the result by the one that makes values.

On a mesh `tensor` shards the heads; latents, and the kernels that make them, are replicated along it. `fsdp` shards the
inputs of all kernels but the last, and the outputs of that.

Shapes in names: B batch, T queries, S keys, E embed, H heads, D head_dim, P rotated dimensions, V width of a value, Q
and R widths of the latents of queries, and of keys and values.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ..attention import Earlier, Pattern, attend_with_cache, attention
from ..layout import SEQUENCE_AXIS, shard_batch
from ..modules import fan_in, partitioned, rms_norm
from ..rotary import Rotation, rotate
from .options import DecoderOptions

_EPSILON = 1e-6  # of the norms of latents, in all public code of these models


class Up(nn.DenseGeneral):
    """A dense layer whose kernel can be used in other products."""

    def matrix(self) -> jax.Array:
        """Return the kernel in the compute dtype; `lora` adds the adapter to it."""
        return self.get_variable("params", "kernel").astype(self.dtype)


class LatentAttention(nn.Module):
    """The counterpart of `modules.Attention` with the options of a decoder.

    Kernels: `query_down` [E, Q] and `query_up` [Q, H, D + P], or `query` [E, H, D + P] without a latent of queries;
    `latent_down` [E, R + P]; `latent_up` [R, H, D + V]; `out` [H, V, E]. The latents have norms.
    """

    task: DecoderOptions
    writers: int  # parts of all layers that write into the residual stream, for the initialisation
    dtype: jnp.dtype

    def setup(self):
        """Declare the kernels."""
        task = self.task

        def down(width: int) -> nn.Dense:
            return nn.Dense(width, use_bias=False, dtype=self.dtype, kernel_init=fan_in(1.0, "embed", None))

        def heads(width: int) -> Up:
            init = fan_in(1.0, "embed", "heads", "kv")
            return Up((task.heads, width), use_bias=False, dtype=self.dtype, kernel_init=init)

        if task.query_latent_dim:
            self.query_down = down(task.query_latent_dim)
            self.query_norm = rms_norm(None, self.dtype, _EPSILON)
            self.query_up = heads(task.score_width)
        else:
            self.query = heads(task.score_width)
        self.latent_down = down(task.latent_dim + task.rope_dim)
        self.latent_norm = rms_norm(None, self.dtype, _EPSILON)
        self.latent_up = heads(task.head_dim + task.value_width)
        zeros = partitioned(nn.initializers.zeros_init(), "heads")
        self.sinks = self.param("sinks", zeros, (task.heads,)) if task.attention_sinks else None
        out_init = fan_in(1 / self.writers, "heads", "kv", "embed")
        self.out = nn.DenseGeneral(
            task.embed_dim, axis=(-2, -1), use_bias=False, dtype=self.dtype, kernel_init=out_init
        )

    def queries(self, x_BxTxE: jax.Array, rotation: Rotation) -> jax.Array:
        """Return the queries, [B, T, H, D + P], the last P dimensions rotated."""
        if self.task.query_latent_dim:
            query = self.query_up(self.query_norm(_named(self.query_down(x_BxTxE))))
        else:
            query = self.query(x_BxTxE)
        whole, rotated = jnp.split(query, [self.task.head_dim], axis=-1)
        return jnp.concatenate([whole, _rotate(rotated, rotation)], axis=-1)

    def kept(self, x_BxSxE: jax.Array, rotation: Rotation) -> jax.Array:
        """Return what a cache keeps of each token, [B, S, 1, R + P]: the normed latent and the rotated key."""
        latent, key = jnp.split(_named(self.latent_down(x_BxSxE)), [self.task.latent_dim], axis=-1)
        return jnp.concatenate([self.latent_norm(latent)[:, :, None], _rotate(key[:, :, None], rotation)], axis=-1)

    def attend(
        self,
        query: jax.Array,
        kept: jax.Array,
        segments: jax.Array,
        pattern: Pattern,
        earlier: Earlier | None = None,
        cached: jax.Array | None = None,
        **run: Any,
    ) -> jax.Array:
        """Return the means of values, [B, T, H, V]; the arguments are those of `modules.Attention.attend`."""
        head_dim, latent_dim = self.task.head_dim, self.task.latent_dim
        if earlier is None or cached is None:
            key, value = jnp.split(self.latent_up(kept[:, :, 0, :latent_dim]), [head_dim], axis=-1)
            shared = jnp.broadcast_to(kept[..., latent_dim:], (*key.shape[:-1], self.task.rope_dim))
            key = jnp.concatenate([key, shared], axis=-1)
            return attention(query, key, value, segments, pattern=pattern, sinks=self.sinks, zigzag=True, **run)
        to_key, to_value = jnp.split(self.latent_up.matrix(), [head_dim], axis=-1)
        whole, rotated = jnp.split(query, [head_dim], axis=-1)
        absorbed = jnp.concatenate([jnp.einsum("bthd,rhd->bthr", whole, to_key), rotated], axis=-1)
        # Keys also are the values: slices of the cache would be copies.
        mixed = attend_with_cache(absorbed, (kept, kept), (cached, cached), segments, earlier, pattern, self.sinks)
        return jnp.einsum("bthr,rhv->bthv", mixed[..., :latent_dim], to_value)

    def project(self, mixed_BxTxHxV: jax.Array) -> jax.Array:
        """Return the update of the residual stream, [B, T, E]."""
        return checkpoint_name(self.out(mixed_BxTxHxV), "attention_out")


def _named(latent: jax.Array) -> jax.Array:
    return checkpoint_name(shard_batch(latent, SEQUENCE_AXIS), "latents")


def _rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotate neighbouring dimensions together, as these models do; the first ones of all pairs come first."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return rotate(jnp.swapaxes(pairs, -1, -2).reshape(x.shape), rotation)
