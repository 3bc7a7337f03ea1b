"""The decoder-only Transformer as Flax modules, for whole rows and, with a cache, for the next tokens of a text.

RMSNorm before each part (or after it), rotary positions, a gated MLP, attention with grouped queries or latent keys and
values, a scan over the layers.
Shapes in names and comments: B batch, T sequence, E embed, H query heads, K key-value heads, G = H / K, D head_dim,
M mlp, V vocab.

Parameters are float32; matmuls run in the compute dtype; norms, rotations, softmaxes and logits are float32.

Initialisation: kernels are truncated normal with variance 1 / fan_in; those that write into the residual stream
(attention/out, mlp/down) are divided by a further sqrt(2 * layers), as in GPT-2. Embeddings have standard deviation
0.02 and, with the default `embedding_scale`, are not scaled on input, as in GPT-2 and Llama: they are small compared
with what the layers add, so that a model with a tied head does not begin by repeating its input. A separate head has
0.02 too.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ..attention import Earlier
from ..layout import SEQUENCE_AXIS, natural, shard_batch, zigzag
from ..modules import EMBEDDING_STD, MLP, Attention, partitioned, rms_norm, run_pattern
from ..rotary import Rotation, rotary_angles
from ..vocabulary import look_up
from . import moe
from .cache import Cache, Kept
from .latents import LatentAttention
from .options import KINDS, DecoderOptions


class Transformer(nn.Module):
    """Maps tokens, segments and positions [B, T] to what the head [V, E] multiplies, [B, T, E]."""

    task: DecoderOptions

    @nn.compact
    def __call__(
        self,
        tokens_BxT: jax.Array,
        segments_BxT: jax.Array,
        positions_BxT: jax.Array,
        bias_LxX: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, jax.Array, moe.Routing | None, dict[str, Kept | None]]:
        """Return [B, T, E], the head [V, E] and, with experts, the sums [layers, ...] of `moe.route`.

        With a cache, whose slots precede those of the tokens, also what attention keeps of them in each stack, such as
        keys and values [layers, B, T, K, D].
        """
        task = self.task
        dtype = jnp.dtype(task.compute_dtype)

        def table(name: str) -> jax.Array:
            init = partitioned(nn.initializers.normal(EMBEDDING_STD), "vocab", "embed")
            return self.param(name, init, (task.vocab_size, task.embed_dim))

        embedding_VxE = table("embedding")
        tokens_BxT, segments_BxT, positions_BxT = (zigzag(x) for x in (tokens_BxT, segments_BxT, positions_BxT))
        x_BxTxE = shard_batch(look_up(embedding_VxE, tokens_BxT, dtype), SEQUENCE_AXIS)
        if task.embedding_scale != 1:
            x_BxTxE *= jnp.asarray(task.embedding_scale, dtype)  # rounded, as in Gemma

        def rotation(kind: str) -> Rotation:
            own = kind == "local" and task.local_rope_theta > 0
            theta, scaling = (task.local_rope_theta, "") if own else (task.rope_theta, task.rope_scaling)
            width = task.rope_dim or task.head_dim
            return rotary_angles(positions_BxT, width, theta, scaling, task.rope_fraction)

        rotations = {kind: rotation(kind) for kind in KINDS if kind in task.kinds}

        routed, routing, kept = task.routed_blocks, None, {}
        earlier, cached = (None, {}) if cache is None else (Earlier(cache.segments, cache.filled), cache.layers)
        run = functools.partial(run_pattern, self, Block, remat=task.remat)
        context = segments_BxT, rotations, earlier
        period = len(task.layer_pattern) or 1
        dense = task.layers - routed
        stacks = ("dense_layers" if routed else "layers", False, 0, dense), ("layers", True, dense, routed)
        for name, has_experts, first, layers in stacks:
            if layers:
                kinds = task.kinds[first : first + period]
                per_layer = bias_LxX if has_experts else None, cached.get(name)
                fields = task, has_experts
                x_BxTxE, (routing, kept[name]) = run(
                    fields, x_BxTxE, *context, kinds=kinds, layers=layers, name=name, per_layer=per_layer
                )
        normed_BxTxE = rms_norm("final_norm", dtype, task.norm_epsilon)(x_BxTxE)
        x_BxTxE = shard_batch(natural(normed_BxTxE), SEQUENCE_AXIS)
        head_VxE = embedding_VxE if task.tied_head else table("head")
        return x_BxTxE, head_VxE.astype(dtype), routing, kept


class Block(nn.Module):
    """Attention and MLP (or experts), each applied to the residual stream [B, T, E] and added to it, with norms."""

    task: DecoderOptions
    routed: bool  # whether it has experts
    kind: str  # one of `KINDS`

    @nn.compact
    def __call__(
        self,
        x_BxTxE: jax.Array,
        segments_BxT: jax.Array,
        rotations: dict[str, Rotation],
        earlier: Earlier | None = None,
        bias_X: jax.Array | None = None,
        cached: Kept | None = None,
    ) -> tuple[jax.Array, tuple[moe.Routing | None, Kept | None]]:
        """Return the residual stream after this layer, and the sums of its router if it has experts.

        With `earlier` also what attention keeps of these slots, for the cache, which has that of the earlier slots if
        there are any.
        """
        task = self.task
        dtype = jnp.dtype(task.compute_dtype)
        writers = 2 * task.layers  # two parts of each layer
        norm = functools.partial(rms_norm, dtype=dtype, epsilon=task.norm_epsilon)
        before, after = task.norms in ("pre", "sandwich"), task.norms in ("post", "sandwich")

        if task.latent_dim:
            layer: Any = LatentAttention(task, writers, dtype, name="attention")
        else:
            sizes = (task.heads, task.kv_heads, task.head_dim, task.embed_dim)
            knobs = task.qkv_bias, task.qk_norm, task.norm_epsilon, task.attention_sinks
            layer = Attention(*sizes, writers, dtype, *knobs, name="attention")
        rotation, pattern = rotations[self.kind], task.pattern(self.kind)
        normed_BxTxE = norm("attention_norm")(x_BxTxE) if before else x_BxTxE
        query, kept = layer.queries(normed_BxTxE, rotation), layer.kept(normed_BxTxE, rotation)
        run = {"block": task.attention_block, "kernel": task.attention}
        mixed = layer.attend(query, kept, segments_BxT, pattern, earlier, cached, **run)
        added_BxTxE = layer.project(mixed)
        x_BxTxE += norm("attention_post_norm")(added_BxTxE) if after else added_BxTxE

        normed_BxTxE = norm("mlp_norm")(x_BxTxE) if before else x_BxTxE
        if self.routed:
            mlp = moe.RoutedMLP(
                task.experts,
                task.expert_width,
                task.shared_experts * task.expert_width,
                task.activation,
                task.expert_router,
                task.expert_room,
                writers,
                dtype,
                name="moe",
            )
            added_BxTxE, routing = mlp(normed_BxTxE, segments_BxT > 0, bias_X)
        else:
            mlp = MLP(task.mlp_dim, task.activation, writers, dtype, name="mlp")
            added_BxTxE, routing = mlp(normed_BxTxE), None
        if after:
            added_BxTxE = norm("mlp_post_norm")(checkpoint_name(added_BxTxE, "mlp_out"))
        kept = None if earlier is None else jax.tree.map(natural, kept)
        return shard_batch(x_BxTxE + added_BxTxE, SEQUENCE_AXIS), (routing, kept)
