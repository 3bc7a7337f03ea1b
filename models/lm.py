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
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from . import layout, moe
from .attention import Rotation, rotary_angles, rotate, self_attention
from .layout import gather_columns, shard_tokens
from .norms import rms_norm
from .parameters import EMBEDDING_STD, axis_names, fan_in, partitioned
from .stack import REMAT_POLICIES, run_layers

Batch = Mapping[str, jax.Array]
BatchSpec = Mapping[str, jax.ShapeDtypeStruct]
Metrics = dict[str, tuple[jax.Array, jax.Array]]


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
    attention_block: int = 0  # keys whose scores are held at once; 0 is all, T^2 a head: for long sequences 512 or so
    experts: int = 0  # of which each token uses a few, in place of one MLP; 0 is the MLP
    experts_per_token: int = 2  # that each token is sent to: 1 as in Switch, 2 as in GShard and Mixtral
    capacity_factor: float = 1.25  # room of an expert over its even share; what finds none passes by it
    expert_group: int = 0  # neighbours in a row that share that room; 0 is the row, less costs less to send
    balance_loss: float = 0.01  # weight of the loss that spreads tokens over experts (Switch: 1e-2)
    router_z_loss: float = 0.001  # weight of the routers' log(Z)^2 (ST-MoE: 1e-3); keeps their logits from drifting

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
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"task.remat is {self.remat!r}; use one of {', '.join(REMAT_POLICIES)}")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"task.compute_dtype is {self.compute_dtype!r}; use 'float32' or 'bfloat16'")
        for name in ("attention_block", "experts", "expert_group", "balance_loss", "router_z_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"task.{name} is {getattr(self, name)}; it must be at least 0")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"task.experts_per_token is {self.experts_per_token}; with task.experts {self.experts} "
                f"it must be 1 to {self.experts}"
            )
        if self.capacity_factor <= 0:
            raise ValueError(f"task.capacity_factor is {self.capacity_factor}; it must be above 0, such as 1.25")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"task.z_loss is {self.z_loss}; it must be at least 0 and finite, such as 1e-4")
        if self.rope_theta <= 0:
            raise ValueError(f"task.rope_theta is {self.rope_theta}; it must be above 0, such as 10_000")

    def init(self, key: jax.Array, batch_spec: BatchSpec) -> dict[str, Any]:
        """Parameters as plain nested dicts {"params": ...}, float32; pure, works under jax.eval_shape."""
        if "tokens" not in batch_spec:
            raise ValueError(f"the batch has {sorted(batch_spec)} and no 'tokens'; a language model needs text data")
        layout.check_sequence(batch_spec["tokens"].shape[1] - 1)
        return nn.unbox(self._boxed_init(key))

    def loss(
        self, variables: dict[str, Any], batch: Batch, *, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[dict[str, Any], Metrics]]:
        """Mean nats per real target (0 where there is none), no model state, and the metrics as (total, weight).

        metrics: "loss", nats over targets, while training with z_loss and the losses of routers; "bits_per_character",
        bits over the characters that begin in the targets (ends of documents cost bits and have no characters);
        "accuracy"; with z_loss also "z_loss", the mean of log(Z)^2 before its weight (PaLM, arXiv 2204.02311, section
        5); with experts also those of `moe.router_metrics`.
        """
        del key  # no dropout
        real_BxT = (batch["segments"][:, 1:] == batch["segments"][:, :-1]) & (batch["segments"][:, 1:] > 0)
        logits_BxTxV, routing = self._apply(variables, batch)
        logsumexp_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
        chosen_BxT = jnp.take_along_axis(logits_BxTxV, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
        nats_BxT = logsumexp_BxT - chosen_BxT

        def total(values_BxT: jax.Array) -> jax.Array:
            return jnp.where(real_BxT, values_BxT, 0).sum(dtype=jnp.float32)

        targets, nats = total(jnp.ones_like(nats_BxT)), total(nats_BxT)
        objective = nats
        z_metrics = {"z_loss": (total(jnp.square(logsumexp_BxT)), targets)} if self.z_loss else {}
        if train and z_metrics:
            objective += self.z_loss * z_metrics["z_loss"][0]
        # As argmax == target, but the maximum is there already; a tie counts as right.
        right = total(chosen_BxT >= logits_BxTxV.max(axis=-1))
        routers = {} if routing is None else moe.router_metrics(routing, self.experts_per_token)
        if train and routers:
            for name in ("balance_loss", "router_z_loss"):
                total_of_routers, inputs = routers[name]
                objective += targets * getattr(self, name) * total_of_routers / jnp.maximum(inputs, 1)
        metrics = {
            "loss": (objective, targets),
            "bits_per_character": (nats / np.log(2), total(batch["characters"][:, 1:])),
            "accuracy": (right, targets),
            **z_metrics,
            **routers,
        }
        return objective / jnp.maximum(targets, 1), ({}, metrics)

    def logits(self, variables: dict[str, Any], batch: Batch) -> jax.Array:
        """Predictions for the inputs `tokens[:, :-1]`: float32 [B, T, V]."""
        return self._apply(variables, batch)[0]

    def logical_axes(self, variables: dict[str, Any]) -> dict[str, Any]:
        """A tuple of names per parameter, one for each dimension.

        Names: layers, experts, embed, mlp, heads, kv_heads, kv (inside a head), vocab, norm (scales of norms).
        """
        boxed = jax.eval_shape(lambda: self._boxed_init(jax.random.key(0)))
        return axis_names(variables, boxed)

    def flops(self, batch_spec: BatchSpec) -> float:
        """Training FLOPs of one batch: 6 N tokens + 12 layers T H D tokens + 6 E V tokens.

        N counts the parameters of the blocks' matmuls, of experts those that a token uses; sending tokens to them and
        back is not counted. The attention term is PaLM's (arXiv 2204.02311, appendix B):
        the whole T x T square, because the masked half is computed too. Recomputation by remat, norms and softmaxes
        are not counted, as is usual for MFU.
        """
        rows, length = batch_spec["tokens"].shape
        sequence = length - 1
        attention = 2 * self.embed_dim * self.head_dim * (self.heads + self.kv_heads)
        block = attention + 3 * self.embed_dim * self.mlp_dim * (self.experts_per_token if self.experts else 1)
        block += self.embed_dim * self.experts  # the router
        per_token = 6 * self.layers * block
        per_token += 12 * self.layers * sequence * self.heads * self.head_dim
        per_token += 6 * self.embed_dim * self.vocab_size
        return float(per_token * rows * sequence)

    def _apply(self, variables: dict[str, Any], batch: Batch) -> tuple[jax.Array, moe.Routing | None]:
        inputs = (batch[name][:, :-1] for name in ("tokens", "segments", "positions"))
        result: Any = Transformer(self).apply(variables, *inputs)
        return result

    def _boxed_init(self, key: jax.Array) -> Any:
        row = jnp.zeros((1, 2), jnp.int32)
        return Transformer(self).init(key, row, row, row)


class Transformer(nn.Module):
    """Tokens, segments and positions [B, T] to logits [B, T, V] and, with experts, the routers' sums for each layer."""

    task: LMTask

    @nn.compact
    def __call__(
        self, tokens_BxT: jax.Array, segments_BxT: jax.Array, positions_BxT: jax.Array
    ) -> tuple[jax.Array, moe.Routing | None]:
        """Logits, float32, and sums [layers, ...] as in `moe.route`."""
        task = self.task
        dtype = jnp.dtype(task.compute_dtype)
        init = nn.initializers.normal(EMBEDDING_STD)
        embedding_VxE = self.param(
            "embedding", partitioned(init, "vocab", "embed"), (task.vocab_size, task.embed_dim)
        ).astype(dtype)
        x_BxTxE = shard_tokens(jnp.take(gather_columns(embedding_VxE), tokens_BxT, axis=0))
        rotation = rotary_angles(positions_BxT, task.head_dim, task.rope_theta)

        x_BxTxE, routing = run_layers(
            Block,
            (task,),
            x_BxTxE,
            segments_BxT,
            rotation,
            layers=task.layers,
            remat=task.remat,
            scan=task.scan_layers,
        )
        x_BxTxE = rms_norm("final_norm", dtype)(x_BxTxE)
        if task.tied_head:
            head_VxE = embedding_VxE
        else:
            shape = (task.vocab_size, task.embed_dim)
            head_VxE = self.param("head", partitioned(init, "vocab", "embed"), shape).astype(dtype)
        return jnp.einsum("bte,ve->btv", x_BxTxE, head_VxE, preferred_element_type=jnp.float32), routing


class Block(nn.Module):
    """Attention and SwiGLU (or experts), each read from a normed residual stream [B, T, E] and added to it."""

    task: LMTask

    @nn.compact
    def __call__(
        self, x_BxTxE: jax.Array, segments_BxT: jax.Array, rotation: Rotation
    ) -> tuple[jax.Array, moe.Routing | None]:
        """The residual stream after this layer, and what its router did, if it has one."""
        task = self.task
        dtype = jnp.dtype(task.compute_dtype)
        attention = Attention(task, name="attention")
        x_BxTxE += attention(rms_norm("attention_norm", dtype)(x_BxTxE), segments_BxT, rotation)
        normed_BxTxE = rms_norm("mlp_norm", dtype)(x_BxTxE)
        if task.experts:
            experts = moe.Experts(task.experts, task.experts_per_token, task.capacity_factor, task.expert_group)
            mlp = moe.RoutedSwiGLU(experts, task.mlp_dim, task.layers, dtype, name="moe")
            added_BxTxE, routing = mlp(normed_BxTxE, segments_BxT > 0)
        else:
            added_BxTxE, routing = SwiGLU(task, name="mlp")(normed_BxTxE), None
        return shard_tokens(x_BxTxE + added_BxTxE), routing


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; kernels [E, H, D], [E, K, D] twice, and [H, D, E]."""

    task: LMTask

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array, segments_BxT: jax.Array, rotation: Rotation) -> jax.Array:
        """What attention adds to the residual stream, [B, T, E]."""
        task = self.task
        dtype = jnp.dtype(task.compute_dtype)
        dense = functools.partial(nn.DenseGeneral, use_bias=False, dtype=dtype)
        into = functools.partial(fan_in, 1.0, "embed")
        query = dense((task.heads, task.head_dim), kernel_init=into("heads", "kv"), name="query")(x_BxTxE)
        key = dense((task.kv_heads, task.head_dim), kernel_init=into("kv_heads", "kv"), name="key")(x_BxTxE)
        value = dense((task.kv_heads, task.head_dim), kernel_init=into("kv_heads", "kv"), name="value")(x_BxTxE)
        if task.qk_norm:
            query, key = rms_norm("query_norm", dtype)(query), rms_norm("key_norm", dtype)(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        mixed_BxTxHxD = self_attention(query, key, value, segments_BxT, task.attention_block)
        out_init = fan_in(1 / (2 * task.layers), "heads", "kv", "embed")
        return dense(task.embed_dim, axis=(-2, -1), kernel_init=out_init, name="out")(mixed_BxTxHxD)


class SwiGLU(nn.Module):
    """silu(x gate) * (x up), then down: kernels [E, M] twice and [M, E]."""

    task: LMTask

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array) -> jax.Array:
        """What the MLP adds to the residual stream, [B, T, E]."""
        task = self.task
        dense = functools.partial(nn.Dense, use_bias=False, dtype=jnp.dtype(task.compute_dtype))
        gate = dense(task.mlp_dim, kernel_init=fan_in(1.0, "embed", "mlp"), name="gate")(x_BxTxE)
        up = dense(task.mlp_dim, kernel_init=fan_in(1.0, "embed", "mlp"), name="up")(x_BxTxE)
        down_init = fan_in(1 / (2 * task.layers), "mlp", "embed")
        return dense(task.embed_dim, kernel_init=down_init, name="down")(nn.silu(gate) * up)
