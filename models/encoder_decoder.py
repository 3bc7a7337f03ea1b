"""An encoder-decoder Transformer as a Flax module, for whole rows and, for a search, position by position.

The model of Vaswani et al. (arXiv 1706.03762), with these differences: RMSNorm before each part instead of LayerNorm
after it, rotary positions in all attention (between target and source too) instead of added sinusoids, and no biases.
One embedding serves both languages and the output.

Initialisation: kernels are truncated normal with variance 1 / fan_in; those that write into the residual stream are
divided by a further sqrt(writers in the stack), as in `lm`. The embedding has standard deviation 0.02 and is multiplied
by sqrt(E) on input: large enough not to vanish beside what attention adds, small enough that the model does not begin
by repeating its input.

Shapes in names: B batch, S source slots, T target slots, E embed, H heads, D head_dim, M mlp, V vocab; in the search K
beams and N slots of the cache. Parameters are float32; matmuls run in the compute dtype; norms, rotations, softmaxes
and logits are float32.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from .beam_search import take
from .layout import shard_batch
from .modules import EMBEDDING_STD, MLP, Attention, partitioned, recomputed, rms_norm, scan_layers
from .rotary import Rotation, rotary_angles
from .vocabulary import look_up, token_logits

KeysValues = tuple[jax.Array, jax.Array]

_ROPE_THETA = 10_000.0


@dataclasses.dataclass(frozen=True)
class TransformerOptions:
    """Sizes and options of the Transformer."""

    vocab_size: int = 2048  # tokens of both languages; must equal data.vocab_size
    encoder_layers: int = 2  # blocks of self-attention and MLP
    decoder_layers: int = 2  # blocks of self-attention, attention to the source, and MLP
    embed_dim: int = 128  # width of the residual stream
    heads: int = 4  # heads of each attention
    head_dim: int = 32  # width of a head; even, for rotary positions
    mlp_dim: int = 512  # hidden width of the MLP
    dropout: float = 0.1  # dropout rate of embeddings and of every update of the residual stream
    attention: str = "auto"  # kernel: "xla", "splash" (TPU), "cudnn" (GPU), or "auto", the one that fits
    remat: str = "none"  # recompute in the backward pass: none, full, dots, minimal, best, or names of values to keep
    compute_dtype: str = "float32"  # of activations and matmuls; "bfloat16" on accelerators


class Transformer(nn.Module):
    """Maps source and target inputs to logits, for whole rows or position by position."""

    task: TransformerOptions
    train: bool  # enables dropout

    def setup(self):
        """Declare the submodules."""
        task = self.task
        dtype = jnp.dtype(task.compute_dtype)
        init = partitioned(nn.initializers.normal(EMBEDDING_STD), "vocab", "embed")
        self.embedding = self.param("embedding", init, (task.vocab_size, task.embed_dim))
        self.encoder = recomputed(EncoderBlock, task.remat)(task, self.train)
        self.decoder = recomputed(DecoderBlock, task.remat)(task, self.train)
        self.encoder_norm, self.decoder_norm = rms_norm(None, dtype), rms_norm(None, dtype)
        self.drop = nn.Dropout(task.dropout, deterministic=not self.train)

    def __call__(self, inputs: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Return what the head multiplies, [B, T, E], and the head [V, E].

        Inputs are source [B, S] and target [B, T], with their segments and positions.
        """
        sources, targets = inputs["source_segments"], inputs["target_segments"]
        source_rotation = self._rotation(inputs["source_positions"])
        memory_BxSxE = self._encode(inputs["source"], sources, source_rotation)
        context = (memory_BxSxE, sources, targets, source_rotation, self._rotation(inputs["target_positions"]))
        stack = scan_layers(lambda block, x, *context: (block(x, *context), None), self.task.decoder_layers)
        x_BxTxE, _ = stack(self.decoder, self._embed(inputs["target"]), *context)
        return self._head(x_BxTxE)

    def memory(self, source_BxS: jax.Array, segments_BxS: jax.Array) -> KeysValues:
        """Return the source's keys and values for every layer of the decoder, [layers, B, S, H, D]."""
        rotation = self._rotation(jnp.broadcast_to(jnp.arange(source_BxS.shape[1]), source_BxS.shape))
        memory_BxSxE = self._encode(source_BxS, segments_BxS, rotation)
        stack = scan_layers(lambda block, carry, *inputs: (carry, block.memory(*inputs)), self.task.decoder_layers)
        return stack(self.decoder, None, memory_BxSxE, rotation)[1]

    def step(
        self,
        tokens_BxK: jax.Array,
        parents_BxK: jax.Array,
        position: jax.Array,
        cache: KeysValues,
        memory: KeysValues,
        segments_BxS: jax.Array,
    ) -> tuple[jax.Array, KeysValues]:
        """Return logits [B, K, V] after the tokens at a position, and the updated cache [layers, B, K, N, H, D].

        Hypothesis k continues hypothesis parents[:, k] of the previous position.
        """
        rotation = self._rotation(jnp.broadcast_to(position, (1, 1)))
        stack = scan_layers(
            lambda block, carry, *inputs: block.step(carry, *inputs),
            self.task.decoder_layers,
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
        )
        carry = self._embed(tokens_BxK), parents_BxK
        sources_BxS = (segments_BxS > 0).astype(jnp.int32)
        (x_BxKxE, _), cache = stack(self.decoder, carry, cache, memory, sources_BxS, position, rotation)
        return token_logits(*self._head(x_BxKxE)), cache

    def _encode(self, source_BxS: jax.Array, segments_BxS: jax.Array, rotation: Rotation) -> jax.Array:
        stack = scan_layers(lambda block, x, *context: (block(x, *context), None), self.task.encoder_layers)
        x_BxSxE, _ = stack(self.encoder, self._embed(source_BxS), segments_BxS, rotation)
        return self.encoder_norm(x_BxSxE)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        found = shard_batch(look_up(self.embedding, tokens, self.task.compute_dtype))
        return self.drop(found * self.task.embed_dim**0.5)

    def _head(self, x_BxTxE: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.decoder_norm(x_BxTxE), self.embedding.astype(self.task.compute_dtype)

    def _rotation(self, positions: jax.Array) -> Rotation:
        return rotary_angles(positions, self.task.head_dim, _ROPE_THETA)


class EncoderBlock(nn.Module):
    """Self-attention and MLP, each applied to the normed residual stream [B, S, E] and added to it."""

    task: TransformerOptions
    train: bool

    @nn.compact
    def __call__(self, x_BxSxE: jax.Array, segments_BxS: jax.Array, rotation: Rotation) -> jax.Array:
        """Return the residual stream after this layer."""
        task = self.task
        dtype = jnp.dtype(task.compute_dtype)
        drop = nn.Dropout(task.dropout, deterministic=not self.train)
        # Two parts of a layer write into the residual stream.
        attention = _attention(task, 2 * task.encoder_layers, name="attention")
        normed = rms_norm("attention_norm", dtype)(x_BxSxE)
        keys_values = attention.keys_values(normed, rotation)
        segments = segments_BxS, segments_BxS
        x_BxSxE += drop(attention(normed, keys_values, segments, rotation, kernel=task.attention))
        mlp = MLP(task.mlp_dim, "", 2 * task.encoder_layers, dtype, name="mlp")
        x_BxSxE += drop(mlp(rms_norm("mlp_norm", dtype)(x_BxSxE)))
        return shard_batch(x_BxSxE)


class DecoderBlock(nn.Module):
    """Self-attention, attention to the source and MLP, each applied to the normed residual stream and added to it."""

    task: TransformerOptions
    train: bool

    def setup(self):
        """Declare the submodules, three of which write into the residual stream."""
        task = self.task
        dtype, writers = jnp.dtype(task.compute_dtype), 3 * task.decoder_layers
        self.attention, self.source_attention = _attention(task, writers), _attention(task, writers)
        self.mlp = MLP(task.mlp_dim, "", writers, dtype)
        self.attention_norm, self.source_norm, self.mlp_norm = (rms_norm(None, dtype) for _ in range(3))
        self.drop = nn.Dropout(task.dropout, deterministic=not self.train)

    def __call__(
        self,
        x_BxTxE: jax.Array,
        memory_BxSxE: jax.Array,
        sources_BxS: jax.Array,
        targets_BxT: jax.Array,
        source_rotation: Rotation,
        rotation: Rotation,
    ) -> jax.Array:
        """Return the residual stream [B, T, E] after this layer."""
        normed = self.attention_norm(x_BxTxE)
        keys_values = self.attention.keys_values(normed, rotation)
        kernel, segments = self.task.attention, (targets_BxT, targets_BxT)
        x_BxTxE += self.drop(self.attention(normed, keys_values, segments, rotation, causal=True, kernel=kernel))
        memory = self.memory(memory_BxSxE, source_rotation)
        return self._rest(x_BxTxE, memory, (targets_BxT, sources_BxS), rotation, kernel)

    def memory(self, memory_BxSxE: jax.Array, source_rotation: Rotation) -> KeysValues:
        """Return keys and values [B, S, H, D] of the source."""
        return self.source_attention.keys_values(memory_BxSxE, source_rotation)

    def step(
        self,
        carry: tuple[jax.Array, jax.Array],
        cache: KeysValues,
        memory: KeysValues,
        sources_BxS: jax.Array,
        position: jax.Array,
        rotation: Rotation,
    ) -> tuple[tuple[jax.Array, jax.Array], KeysValues]:
        """Return the residual stream [B, K, E] of a position with parents [B, K], and the cache [B, K, N, H, D]."""
        x_BxKxE, parents_BxK = carry
        normed = self.attention_norm(x_BxKxE)
        new = self.attention.keys_values(normed, rotation)
        keys, values = (
            shard_batch(take(old, parents_BxK).at[:, :, position].set(now)) for old, now in zip(cache, new, strict=True)
        )
        # Each hypothesis has keys of its own: to attention it is a row of one slot.
        row, row_keys, row_values = (x.reshape(-1, *x.shape[2:]) for x in (normed[:, :, None], keys, values))
        one = jnp.ones((1, 1), jnp.int32)
        filled_1xN = (jnp.arange(keys.shape[2]) <= position)[None].astype(jnp.int32)
        mixed = self.attention(row, (row_keys, row_values), (one, filled_1xN), rotation)
        x_BxKxE += mixed.reshape(x_BxKxE.shape)
        return (self._rest(x_BxKxE, memory, (one, sources_BxS), rotation, "xla"), parents_BxK), (keys, values)

    def _rest(
        self,
        x_BxTxE: jax.Array,
        memory: KeysValues,
        segments: tuple[jax.Array, jax.Array],
        rotation: Rotation,
        kernel: str,
    ) -> jax.Array:
        normed = self.source_norm(x_BxTxE)
        x_BxTxE += self.drop(self.source_attention(normed, memory, segments, rotation, kernel=kernel))
        x_BxTxE += self.drop(self.mlp(self.mlp_norm(x_BxTxE)))
        return shard_batch(x_BxTxE)


def _attention(task: TransformerOptions, writers: int, name: str | None = None) -> Attention:
    sizes = (task.heads, task.heads, task.head_dim, task.embed_dim)
    return Attention(*sizes, writers, jnp.dtype(task.compute_dtype), name=name)
