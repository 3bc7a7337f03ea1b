"""BERT: a bidirectional Transformer encoder that predicts masked tokens and whether one text follows another.

Devlin et al. 2019 (arXiv 1810.04805): learned positions, token types, a norm after each part, GELU (in the tanh form
of the published code), dropout. Shapes in names: B batch, T sequence, E embed, H heads, D = E / H, M mlp, V vocab,
P predictions in a row.

Parameters are float32; matmuls run in the compute dtype; norms, softmaxes and logits are float32. Kernels and
embeddings begin as a normal distribution of standard deviation `init_std` truncated at two of them, which leaves a
standard deviation of 0.88 `init_std`, as published; biases begin at zero.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .biased import PATTERN, Attention, GeluMLP, dense, dropped, norm
from .kernels import attention as kernels
from .layout import gather_columns, shard_batch
from .linen_task import Batch, BatchSpec, LinenTask, Metrics, check_options
from .modules import partitioned, run_layers
from .vocabulary import class_losses, look_up, real_tokens

_TYPES = 2  # the first and the second text of a pair
_EPSILON = 1e-12  # of the norms, as published


@dataclasses.dataclass(frozen=True)
class BertTask(LinenTask):
    """Prediction of masked tokens and next sentences.

    A batch holds int32 arrays: tokens [B, T], some masked; segments [B, T], 1 and 2 for the two texts of a pair and 0
    for padding; masked_positions [B, P], the slots to predict, padded with 0 (slot 0 is [CLS], never masked);
    masked_tokens [B, P], the tokens to predict; is_next [B], 1 if the second text follows the first.

    The loss of a row is the sum of the nats of its masked tokens divided by P, plus `next_weight` times the nats of
    is_next. For rows with P masked tokens and a weight of 1 it is the published loss. A masked token has the same
    weight in every row and micro-batch; a mean over the masked tokens of the whole batch would not be a sum over
    micro-batches.
    """

    vocab_size: int = 30_522  # number of tokens; must equal data.vocab_size
    max_length: int = 512  # entries of the table of positions; the longest row of any phase
    layers: int = 12  # blocks of attention and MLP
    embed_dim: int = 768  # width of the residual stream
    heads: int = 12  # attention heads, each of width embed_dim / heads
    mlp_dim: int = 3072  # hidden width of the MLP, usually 4 embed_dim
    dropout: float = 0.1  # dropout rate of embeddings, attention weights and the output of each part
    next_weight: float = 1.0  # weight of is_next in the loss; small batches need less, its gradient is mostly noise
    init_std: float = 0.02  # standard deviation of initial kernels and embeddings; narrow models need more
    position_init: str = "normal"  # initial table of positions; "sinusoidal" encodes neighbourhood from the first step
    attention: str = "auto"  # kernel: "xla", "splash" (TPU), "cudnn" (GPU), or "auto"; with dropout only XLA fits
    remat: str = "none"  # recompute in the backward pass: none, full, dots, minimal, best, or names of values to keep
    compute_dtype: str = "float32"  # of activations and matmuls; "bfloat16" on accelerators

    def __post_init__(self):
        check_options(
            self,
            positive="vocab_size max_length layers embed_dim heads mlp_dim",
            not_negative="next_weight",
            fractions="dropout",
            position_init=("normal", "sinusoidal"),
            attention=kernels.KERNELS,
        )
        if self.embed_dim % self.heads:
            raise ValueError(
                f"task.embed_dim={self.embed_dim}: must be divisible by task.heads={self.heads}; use "
                f"{self.embed_dim // self.heads * self.heads or self.heads}"
            )
        if self.init_std <= 0:
            raise ValueError(f"task.init_std={self.init_std}: must be above 0; 0.02 as published")

    def boxed(self, key: jax.Array) -> Any:
        """See `LinenTask.boxed`. Axes: layers, embed, mlp, heads, kv (in a head), vocab, norm, None."""
        row = jnp.zeros((1, 2), jnp.int32)
        # The row is too short for a kernel; parameters do not depend on it.
        return Bert(dataclasses.replace(self, attention="xla"), 0.0).init(key, row, row, row[:, :1])

    def check_batch(self, batch_spec: BatchSpec) -> None:
        """See `LinenTask.check_batch`."""
        if "masked_positions" not in batch_spec:
            raise ValueError(
                f"the batch has {sorted(batch_spec)} and no 'masked_positions'; BERT needs masked text, "
                "shampax.framework.data.masked:MaskedTextData"
            )
        length = batch_spec["tokens"].shape[1]
        if length > self.max_length:
            raise ValueError(f"task.max_length={self.max_length}: rows have {length} tokens; set it to {length}")
        self._kernel(batch_spec)

    def notes(self, batch_spec: BatchSpec) -> tuple[str, ...]:
        """Return which kernel computes attention in training, and why."""
        return ("attention: {} ({})".format(*self._kernel(batch_spec)),)

    def _kernel(self, batch_spec: BatchSpec) -> kernels.Choice:
        rows, length = batch_spec["tokens"].shape
        shape = rows, length, self.heads, self.embed_dim // self.heads
        query = jax.ShapeDtypeStruct(shape, jnp.dtype(self.compute_dtype))
        return kernels.choose(self.attention, query, length, self.heads, PATTERN, drops=self.dropout > 0)

    def loss(
        self, variables: dict[str, Any], batch: Batch, *, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[dict[str, Any], Metrics]]:
        """Return the mean loss of the rows (0 for an empty batch), no model state, and metrics as (total, weight).

        metrics: "loss", over rows; "masked_loss", nats over masked tokens; "masked_accuracy", over masked tokens;
        "next_sentence_accuracy", over rows. Rows whose segments are all 0 do not count.
        """
        masked_BxPxV, next_Bx2 = self.logits(variables, batch, dropout_key=key if train else None)
        masked = class_losses(masked_BxPxV, batch["masked_tokens"], batch["masked_positions"] > 0)
        follows = class_losses(next_Bx2, batch["is_next"], batch["segments"][:, 0] > 0)
        objective = masked.nats / masked_BxPxV.shape[1] + self.next_weight * follows.nats
        metrics = {
            "loss": (objective, follows.count),
            "masked_loss": (masked.nats, masked.count),
            "masked_accuracy": (masked.correct, masked.count),
            "next_sentence_accuracy": (follows.correct, follows.count),
        }
        if train:
            metrics["real_tokens"] = real_tokens(batch["segments"])
        return objective / jnp.maximum(follows.count, 1), ({}, metrics)

    def logits(
        self, variables: dict[str, Any], batch: Batch, *, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return float32 logits of masked tokens [B, P, V] and of is_next [B, 2]; dropout only with a key."""
        inputs = (batch[name] for name in ("tokens", "segments", "masked_positions"))
        module = Bert(self, self.dropout if dropout_key is not None else 0.0)
        logits: Any = module.apply(variables, *inputs, rngs={} if dropout_key is None else {"dropout": dropout_key})
        return logits

    def flops(self, batch_spec: BatchSpec) -> float:
        """Return the training FLOPs of one batch: three times the forward pass's matrix products, 2 per multiplication.

        A row has layers x (4 E^2 + 2 E M + 2 T E) in each of T slots, E^2 + E V for each of P predictions, and
        E^2 + 2 E for is_next. Attention counts the whole T x T square; recomputation by remat, lookups, norms and
        softmaxes are not counted, as is usual for MFU.
        """
        rows, length = batch_spec["tokens"].shape
        embed = self.embed_dim
        slot = self.layers * (4 * embed**2 + 2 * embed * self.mlp_dim + 2 * length * embed)
        prediction = embed**2 + embed * self.vocab_size
        pair = embed**2 + 2 * embed
        return 6.0 * rows * (length * slot + batch_spec["masked_positions"].shape[1] * prediction + pair)


class Bert(nn.Module):
    """Maps tokens and segments [B, T] and masked positions [B, P] to logits [B, P, V] and [B, 2]."""

    task: BertTask
    dropout: float

    @nn.compact
    def __call__(
        self, tokens_BxT: jax.Array, segments_BxT: jax.Array, masked_BxP: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return logits, float32."""
        task = self.task
        x_BxTxE, words_VxE = Embeddings(task, self.dropout, name="embeddings")(tokens_BxT, segments_BxT)
        real_BxT = (segments_BxT > 0).astype(jnp.int32)  # both texts see each other
        x_BxTxE, _ = run_layers(Block, (task, self.dropout), x_BxTxE, real_BxT, layers=task.layers, remat=task.remat)
        x_BxPxE = shard_batch(jnp.take_along_axis(x_BxTxE, masked_BxP[..., None], axis=1))
        return MaskedHead(task, name="masked_head")(x_BxPxE, words_VxE), NextHead(task, name="next_head")(
            shard_batch(x_BxTxE[:, 0])
        )


class Embeddings(nn.Module):
    """The sum of word, position and token type embeddings [B, T], with norm and dropout."""

    task: BertTask
    dropout: float

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array, segments_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the residual stream [B, T, E] and the table of words [V, E] in the compute dtype."""
        task = self.task
        dtype = jnp.dtype(task.compute_dtype)
        init = nn.initializers.truncated_normal(task.init_std)
        words_VxE = self.param("words", partitioned(init, "vocab", "embed"), (task.vocab_size, task.embed_dim))
        position_init = functools.partial(_sinusoids, task.init_std) if task.position_init == "sinusoidal" else init
        shape = (task.max_length, task.embed_dim)
        positions = self.param("positions", partitioned(position_init, None, "embed"), shape)
        types = self.param("types", partitioned(init, None, "embed"), (_TYPES, task.embed_dim))
        types_BxT = jnp.maximum(segments_BxT - 1, 0)  # padding has the first type, as published
        x_BxTxE = shard_batch(look_up(words_VxE, tokens_BxT, dtype))
        x_BxTxE += gather_columns(positions.astype(dtype))[: tokens_BxT.shape[1]]
        x_BxTxE += shard_batch(look_up(types, types_BxT, dtype))
        return shard_batch(dropped(norm("norm", dtype, _EPSILON)(x_BxTxE), self.dropout)), words_VxE.astype(dtype)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream [B, T, E], followed by a norm."""

    task: BertTask
    dropout: float

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array, real_BxT: jax.Array) -> tuple[jax.Array, None]:
        """Return the residual stream after this layer."""
        dtype = jnp.dtype(self.task.compute_dtype)
        mixed = Attention(self.task, self.dropout, name="attention")(x_BxTxE, real_BxT)
        x_BxTxE = norm("attention_norm", dtype, _EPSILON)(x_BxTxE + dropped(mixed, self.dropout))
        mlp = GeluMLP(self.task, name="mlp")(x_BxTxE)
        return shard_batch(norm("mlp_norm", dtype, _EPSILON)(x_BxTxE + dropped(mlp, self.dropout))), None


class MaskedHead(nn.Module):
    """Predicts masked tokens: dense, GELU and norm, then the table of words and a bias for each."""

    task: BertTask

    @nn.compact
    def __call__(self, x_BxPxE: jax.Array, words_VxE: jax.Array) -> jax.Array:
        """Return logits, float32 [B, P, V]."""
        task = self.task
        hidden = nn.gelu(dense(task, task.embed_dim, ("embed",), ("mlp",), name="dense")(x_BxPxE))
        hidden_BxPxE = shard_batch(norm("norm", jnp.dtype(task.compute_dtype), _EPSILON)(hidden))
        bias_V = self.param("bias", partitioned(nn.initializers.zeros_init(), "vocab"), (task.vocab_size,))
        return jnp.einsum("bpe,ve->bpv", hidden_BxPxE, words_VxE, preferred_element_type=jnp.float32) + bias_V


class NextHead(nn.Module):
    """Predicts is_next from the slot of [CLS]: the pooler (dense, tanh) and two classes."""

    task: BertTask

    @nn.compact
    def __call__(self, x_BxE: jax.Array) -> jax.Array:
        """Return logits, float32 [B, 2]; class 1 is "follows"."""
        task = self.task
        pooled_BxE = shard_batch(jnp.tanh(dense(task, task.embed_dim, ("embed",), (None,), name="pooler")(x_BxE)))
        return dense(task, 2, (None,), (None,), name="classes")(pooled_BxE).astype(jnp.float32)


def _sinusoids(scale: float, key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Return sines and cosines with wavelengths from 2 pi to 2 pi T slots and root mean square `scale`; [T, E].

    As Vaswani et al. 2017 (arXiv 1706.03762), whose longest wavelength is 10,000 x 2 pi.
    """
    del key
    length, embed = shape
    places = jnp.arange(embed) // 2 * 2 / embed
    angles_TxE = jnp.arange(length)[:, None] * float(length) ** -places
    return (scale * 2**0.5 * jnp.where(jnp.arange(embed) % 2, jnp.cos(angles_TxE), jnp.sin(angles_TxE))).astype(dtype)
