"""A decoder-only Transformer language model and its task.

RMSNorm before each part, rotary positions, SwiGLU, grouped-query attention, `nn.scan` over the layers. Shapes in
names and comments: B batch, T sequence, E embed, H query heads, K key-value heads, G = H / K, D head_dim, M mlp,
V vocab.

Parameters are float32; matmuls run in the compute dtype; norms, rotations, softmaxes and logits are float32.

Initialisation: kernels are truncated normal with variance 1 / fan_in, those that write into the residual stream
(attention/out, mlp/down) divided by a further sqrt(2 * layers), as in GPT-2. Embeddings have standard deviation 0.02
and are not scaled on their way in (the norms make that immaterial), as in GPT-2 and Llama: small against what the
layers add, so that with a tied head the model does not begin by repeating its input. A separate head has 0.02 too.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .layout import gather_columns, shard_batch

Batch = Mapping[str, jax.Array]
BatchSpec = Mapping[str, jax.ShapeDtypeStruct]
Metrics = dict[str, tuple[jax.Array, jax.Array]]

_EMBEDDING_STD = 0.02
_REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    # Products with weights are kept, attention's (they have batch dimensions, and grow with T^2) are not.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class LMTask:
    """Next-token prediction on packed rows, as the trainer sees it.

    A batch holds int32 arrays [B, T + 1]: tokens, segments (0 is padding), positions and characters; inputs are
    `[:, :-1]` and targets `[:, 1:]`, of which those count whose segment is their input's and is not 0.
    """

    vocab_size: int = 4096  # must be the data's
    layers: int = 4  # blocks of attention and MLP
    embed_dim: int = 256  # width of the residual stream
    heads: int = 4  # query heads
    kv_heads: int = 4  # key and value heads, each shared by heads / kv_heads query heads
    head_dim: int = 64  # per head; even, because rotary positions turn pairs
    mlp_dim: int = 768  # hidden width of SwiGLU, customarily 8/3 of embed_dim
    rope_theta: float = 10_000.0  # longest rotary wavelength / 2 pi; larger for longer sequences
    tied_head: bool = True  # the embedding is also the head; saves V * E parameters
    qk_norm: bool = False  # RMSNorm on queries and keys: keeps attention logits bounded in large models
    remat: str = "none"  # recompute in the backward pass: "none", "full" (least memory) or "dots"
    compute_dtype: str = "float32"  # of activations and matmuls; "bfloat16" on accelerators
    z_loss: float = 0.0  # weight of log(Z)^2 in the training loss (PaLM: 1e-4); keeps logits from drifting
    scan_layers: bool = True  # one traced block for all layers; False unrolls them, to compare

    def __post_init__(self):
        for name in ("vocab_size", "layers", "embed_dim", "heads", "kv_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"task.{name} is {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"task.heads {self.heads} is not divisible by task.kv_heads {self.kv_heads}; "
                f"use a divisor of {self.heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"task.head_dim is {self.head_dim}; rotary positions need it even: {self.head_dim + 1}")
        if self.remat not in _REMAT_POLICIES:
            raise ValueError(f"task.remat is {self.remat!r}; use one of {', '.join(_REMAT_POLICIES)}")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"task.compute_dtype is {self.compute_dtype!r}; use 'float32' or 'bfloat16'")
        if self.z_loss < 0 or self.rope_theta <= 0:
            raise ValueError(f"task.z_loss {self.z_loss} must be >= 0 and task.rope_theta {self.rope_theta} > 0")

    def init(self, key: jax.Array, batch_spec: BatchSpec) -> dict[str, Any]:
        """Parameters as plain nested dicts {"params": ...}, float32; pure, works under jax.eval_shape."""
        if "tokens" not in batch_spec:
            raise ValueError(f"the batch has {sorted(batch_spec)} and no 'tokens'; a language model needs text data")
        return nn.unbox(self._boxed_init(key))

    def loss(
        self, variables: dict[str, Any], batch: Batch, *, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[dict[str, Any], Metrics]]:
        """Mean nats per real target (0 where there is none), no model state, and the metrics as (total, weight).

        metrics: "loss", nats over targets, with z_loss while training; "bits_per_character", bits over the characters
        that begin in the targets (ends of documents cost bits and have no characters); "accuracy".
        """
        del key  # no dropout
        real_BxT = (batch["segments"][:, 1:] == batch["segments"][:, :-1]) & (batch["segments"][:, 1:] > 0)
        logits_BxTxV = self.logits(variables, batch)
        logsumexp_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
        chosen_BxT = jnp.take_along_axis(logits_BxTxV, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
        nats_BxT = logsumexp_BxT - chosen_BxT

        def total(values_BxT: jax.Array) -> jax.Array:
            return jnp.where(real_BxT, values_BxT, 0).sum(dtype=jnp.float32)

        targets, nats = total(jnp.ones_like(nats_BxT)), total(nats_BxT)
        objective = nats
        if train and self.z_loss:
            objective += self.z_loss * total(jnp.square(logsumexp_BxT))
        # As argmax == target, but the maximum is there already; a tie counts as right.
        right = total(chosen_BxT >= logits_BxTxV.max(axis=-1))
        metrics = {
            "loss": (objective, targets),
            "bits_per_character": (nats / np.log(2), total(batch["characters"][:, 1:])),
            "accuracy": (right, targets),
        }
        return objective / jnp.maximum(targets, 1), ({}, metrics)

    def logits(self, variables: dict[str, Any], batch: Batch) -> jax.Array:
        """Predictions for the inputs `tokens[:, :-1]`: float32 [B, T, V]."""
        inputs = (batch[name][:, :-1] for name in ("tokens", "segments", "positions"))
        logits: Any = Transformer(self).apply(variables, *inputs)
        return logits

    def logical_axes(self, variables: dict[str, Any]) -> dict[str, Any]:
        """A tuple of names per parameter, one for each dimension.

        Names: layers, embed, mlp, heads, kv_heads, kv (inside a head), vocab, norm (scales of norms).
        """
        boxed = jax.eval_shape(lambda: self._boxed_init(jax.random.key(0)))
        names = jax.tree.map(
            lambda box: tuple(box.names), boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
        )
        return jax.tree.map(lambda _, axes: axes, variables, names)

    def flops(self, batch_spec: BatchSpec) -> float:
        """Training FLOPs of one batch: 6 N tokens + 12 layers T H D tokens + 6 E V tokens.

        N counts the parameters of the blocks' matmuls. The attention term is PaLM's (arXiv 2204.02311, appendix B):
        the whole T x T square, because the masked half is computed too. Recomputation by remat, norms and softmaxes
        are not counted, as is usual for MFU.
        """
        rows, length = batch_spec["tokens"].shape
        sequence = length - 1
        attention = 2 * self.embed_dim * self.head_dim * (self.heads + self.kv_heads)
        block = attention + 3 * self.embed_dim * self.mlp_dim
        per_token = 6 * self.layers * block
        per_token += 12 * self.layers * sequence * self.heads * self.head_dim
        per_token += 6 * self.embed_dim * self.vocab_size
        return float(per_token * rows * sequence)

    def _boxed_init(self, key: jax.Array) -> Any:
        row = jnp.zeros((1, 2), jnp.int32)
        return Transformer(self).init(key, row, row, row)


class Transformer(nn.Module):
    """Tokens, segments and positions [B, T] to logits [B, T, V]."""

    task: LMTask

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array, segments_BxT: jax.Array, positions_BxT: jax.Array) -> jax.Array:
        """Logits, float32."""
        task = self.task
        dtype = jnp.dtype(task.compute_dtype)
        init = nn.initializers.normal(_EMBEDDING_STD)
        embedding_VxE = self.param(
            "embedding", _partitioned(init, "vocab", "embed"), (task.vocab_size, task.embed_dim)
        ).astype(dtype)
        x_BxTxE = shard_batch(jnp.take(gather_columns(embedding_VxE), tokens_BxT, axis=0))
        visible_BxTxT = _visible(segments_BxT)
        rotation = rotary_angles(positions_BxT, task.head_dim, task.rope_theta)

        block = Block
        if task.remat != "none":
            # Inside scan the loop itself keeps XLA from merging the recomputation away.
            block = nn.remat(Block, policy=_REMAT_POLICIES[task.remat], prevent_cse=not task.scan_layers)
        if task.scan_layers:
            stack = nn.scan(
                lambda block, x, *context: (block(x, *context), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
                length=task.layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x_BxTxE, _ = stack(block(task, name="layers"), x_BxTxE, visible_BxTxT, rotation)
        else:
            for layer in range(task.layers):
                x_BxTxE = block(task, name=f"layers_{layer}")(x_BxTxE, visible_BxTxT, rotation)

        x_BxTxE = _norm("final_norm", dtype)(x_BxTxE)
        if task.tied_head:
            head_VxE = embedding_VxE
        else:
            shape = (task.vocab_size, task.embed_dim)
            head_VxE = self.param("head", _partitioned(init, "vocab", "embed"), shape).astype(dtype)
        return jnp.einsum("bte,ve->btv", x_BxTxE, head_VxE, preferred_element_type=jnp.float32)


class Block(nn.Module):
    """Attention and SwiGLU, each read from a normed residual stream [B, T, E] and added to it."""

    task: LMTask

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array, visible_BxTxT: jax.Array, rotation: "Rotation") -> jax.Array:
        """The residual stream after this layer."""
        dtype = jnp.dtype(self.task.compute_dtype)
        attention, mlp = Attention(self.task, name="attention"), SwiGLU(self.task, name="mlp")
        x_BxTxE += attention(_norm("attention_norm", dtype)(x_BxTxE), visible_BxTxT, rotation)
        x_BxTxE += mlp(_norm("mlp_norm", dtype)(x_BxTxE))
        return shard_batch(x_BxTxE)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; kernels [E, H, D], [E, K, D] twice, and [H, D, E]."""

    task: LMTask

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array, visible_BxTxT: jax.Array, rotation: "Rotation") -> jax.Array:
        """What attention adds to the residual stream, [B, T, E]."""
        task = self.task
        dtype = jnp.dtype(task.compute_dtype)
        dense = functools.partial(nn.DenseGeneral, use_bias=False, dtype=dtype)
        into = functools.partial(_fan_in, 1.0, "embed")
        query = dense((task.heads, task.head_dim), kernel_init=into("heads", "kv"), name="query")(x_BxTxE)
        key = dense((task.kv_heads, task.head_dim), kernel_init=into("kv_heads", "kv"), name="key")(x_BxTxE)
        value = dense((task.kv_heads, task.head_dim), kernel_init=into("kv_heads", "kv"), name="value")(x_BxTxE)
        if task.qk_norm:
            query, key = _norm("query_norm", dtype)(query), _norm("key_norm", dtype)(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        mixed_BxTxHxD = attend(query, key, value, visible_BxTxT)
        out_init = _fan_in(1 / (2 * task.layers), "heads", "kv", "embed")
        return dense(task.embed_dim, axis=(-2, -1), kernel_init=out_init, name="out")(mixed_BxTxHxD)


class SwiGLU(nn.Module):
    """silu(x gate) * (x up), then down: kernels [E, M] twice and [M, E]."""

    task: LMTask

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array) -> jax.Array:
        """What the MLP adds to the residual stream, [B, T, E]."""
        task = self.task
        dense = functools.partial(nn.Dense, use_bias=False, dtype=jnp.dtype(task.compute_dtype))
        gate = dense(task.mlp_dim, kernel_init=_fan_in(1.0, "embed", "mlp"), name="gate")(x_BxTxE)
        up = dense(task.mlp_dim, kernel_init=_fan_in(1.0, "embed", "mlp"), name="up")(x_BxTxE)
        down_init = _fan_in(1 / (2 * task.layers), "mlp", "embed")
        return dense(task.embed_dim, kernel_init=down_init, name="down")(nn.silu(gate) * up)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(D)) v for query [B, T, H, D], key and value [B, T, K, D], visible bool [B, T, T].

    Query head h reads key-value head h // (H / K). Scores and softmax are float32, the result has the query's dtype.
    Every query must see at least one key.
    """
    batch, length, heads, head_dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(query.shape)


Rotation = tuple[jax.Array, jax.Array]


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> Rotation:
    """Cosines and sines, float32 [B, T, 1, head_dim / 2], for positions [B, T] (RoFormer, arXiv 2104.09864)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Turn the pairs (x[i], x[i + D/2]) of x [B, T, heads, D] by their position's angles; computed in float32."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _visible(segments_BxT: jax.Array) -> jax.Array:
    """Which slots a slot may read, bool [B, T, T]: itself and earlier ones of its own segment."""
    slots = jnp.arange(segments_BxT.shape[1])
    causal_TxT = slots[:, None] >= slots[None, :]
    return causal_TxT & (segments_BxT[:, :, None] == segments_BxT[:, None, :])


def _partitioned(initializer: nn.initializers.Initializer, *names: str) -> nn.initializers.Initializer:
    return nn.with_logical_partitioning(initializer, names)


def _fan_in(scale: float, *names: str) -> nn.initializers.Initializer:
    """Truncated normal, variance scale / fan_in; the dense layers pass their kernel as [inputs, outputs]."""
    return _partitioned(nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal"), *names)


def _norm(name: str, dtype: jnp.dtype) -> nn.RMSNorm:
    return nn.RMSNorm(dtype=dtype, scale_init=_partitioned(nn.initializers.ones_init(), "norm"), name=name)
