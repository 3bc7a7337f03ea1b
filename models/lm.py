"""A decoder-only Transformer language model and its task.

RMSNorm before each part, rotary positions, SwiGLU, grouped-query attention, `nn.scan` over the layers. Shapes in
names and comments: B batch, T sequence, E embed, H query heads, K key-value heads, G = H / K, D head_dim, M mlp,
V vocab.

Parameters are float32; matmuls run in the compute dtype; norms, rotations, softmaxes and logits are float32.

Initialisation: kernels are truncated normal with variance 1 / fan_in; those that write into the residual stream
(attention/out, mlp/down) are divided by a further sqrt(2 * layers), as in GPT-2. Embeddings have standard deviation
0.02 and are not scaled on input, as in GPT-2 and Llama: they are small compared with what the layers add, so that a
model with a tied head does not begin by repeating its input. A separate head has 0.02 too.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from . import kernels, layout, moe
from .attention import Pattern, Rotation, attention, rotary_angles
from .layout import SEQUENCE_AXIS, natural, shard_batch, zigzag
from .linen_task import Batch, BatchSpec, LinenTask, Metrics, check_options
from .modules import EMBEDDING_STD, MLP, Attention, partitioned, rms_norm, run_layers
from .vocabulary import look_up, real_targets, real_tokens, token_logits, token_losses


@dataclasses.dataclass(frozen=True)
class LMTask(LinenTask):
    """Next-token prediction on packed rows.

    A batch holds int32 arrays [B, T + 1]: tokens, segments (0 is padding), positions and characters. Inputs are
    `[:, :-1]` and targets `[:, 1:]`; a target counts if its segment equals its input's and is not 0.
    """

    vocab_size: int = 4096  # number of tokens; must equal data.vocab_size
    layers: int = 4  # blocks of attention and MLP
    embed_dim: int = 256  # width of the residual stream
    heads: int = 4  # query heads
    kv_heads: int = 4  # key and value heads; heads / kv_heads query heads share each
    head_dim: int = 64  # width of a head; even, for rotary positions
    mlp_dim: int = 768  # hidden width of SwiGLU, usually 8/3 of embed_dim
    rope_theta: float = 10_000.0  # longest rotary wavelength / 2 pi; larger for longer sequences
    tied_head: bool = True  # use the embedding as output head; saves vocab_size * embed_dim parameters
    remat: str = "none"  # recompute in the backward pass: none, full, dots, minimal, best, or names of values to keep
    compute_dtype: str = "float32"  # of activations and matmuls; "bfloat16" on accelerators
    z_loss: float = 0.0  # weight of log(Z)^2 in the training loss (PaLM: 1e-4); limits drift of the logits
    loss_chunks: int = 0  # parts of the vocabulary whose logits are computed in turn, to save memory; 0: one
    attention: str = "auto"  # kernel: "xla", "splash" (TPU), "cudnn" (GPU), or "auto", the one that fits
    attention_block: int = 0  # queries whose scores are held at once (128 for long rows); 0 holds all T x T scores
    attention_window: int = 0  # number of the last tokens that a token sees, with itself; 0 for all
    attention_soft_cap: float = 0.0  # limit of attention's scores, cap * tanh(score / cap) (Gemma 2: 50); 0 for none
    experts: int = 0  # number of experts that replace the MLP; 0 keeps the MLP
    experts_per_token: int = 2  # experts per token: 1 as in Switch, 2 as in GShard and Mixtral
    expert_dim: int = 0  # hidden width of an expert; 0 is mlp_dim
    shared_experts: int = 0  # experts that every token uses in addition to those chosen for it (DeepSeek-V3: 1)
    dense_layers: int = 0  # first layers that keep the MLP (DeepSeek-V3: 3)
    router: str = "softmax"  # scores of experts: "softmax" as in Switch, "sigmoid" as in DeepSeek-V3
    router_scale: float = 1.0  # factor of the experts' weights, which sum to 1 (DeepSeek-V3: 2.5)
    expert_room: float = 1.25  # rows that a device can send to another at once / mean; a larger load takes more rounds
    balance_rate: float = 0.0  # step of biases that balance the load of experts (DeepSeek-V3: 1e-3); 0 for none
    balance_loss: float = 0.01  # weight of the loss that balances the load of experts (Switch: 1e-2)
    router_z_loss: float = 0.001  # weight of the routers' log(Z)^2 (ST-MoE: 1e-3); limits drift of their logits

    def __post_init__(self):
        check_options(
            self,
            positive="vocab_size layers embed_dim heads kv_heads head_dim mlp_dim",
            not_negative="attention_block attention_soft_cap attention_window balance_loss balance_rate dense_layers "
            "expert_dim experts loss_chunks router_z_loss shared_experts z_loss",
            attention=kernels.KERNELS,
            router=moe.ROUTERS,
        )
        if self.heads % self.kv_heads:
            raise ValueError(f"task.kv_heads={self.kv_heads}: must divide task.heads={self.heads}")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"task.experts_per_token={self.experts_per_token}: must be 1 to task.experts={self.experts}"
            )
        if self.experts and self.dense_layers >= self.layers:
            raise ValueError(f"task.dense_layers={self.dense_layers}: must be below task.layers={self.layers}")
        for name in ("expert_room", "rope_theta", "router_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"task.{name}={getattr(self, name)}: must be above 0")

    @property
    def routed_blocks(self) -> int:
        """Number of layers with experts, the last ones."""
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def expert_width(self) -> int:
        """Hidden width of an expert."""
        return self.expert_dim or self.mlp_dim

    def boxed(self, key: jax.Array) -> Any:
        """See `LinenTask.boxed`. Axes: layers, experts, embed, mlp, heads, kv_heads, kv (in a head), vocab, norm."""
        row = jnp.zeros((1, 2), jnp.int32)
        # The row is too short for a kernel; parameters do not depend on it.
        variables = Transformer(dataclasses.replace(self, attention="xla")).init(key, row, row, row)
        if not self._has_biases:
            return variables
        zeros_LxX = jnp.zeros((self.routed_blocks, self.experts))
        return {**variables, "routers": {"bias": zeros_LxX, "load": zeros_LxX}}

    @property
    def _has_biases(self) -> bool:
        return self.experts > 0 and self.balance_rate > 0

    def settle(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """Move the routers' biases by the load of the experts in all micro-batches, and reset the load."""
        if not self._has_biases:
            return model_state
        bias, load = model_state["routers"]["bias"], model_state["routers"]["load"]
        return {"routers": {"bias": moe.leveled(bias, load, self.balance_rate), "load": jnp.zeros_like(load)}}

    def check_batch(self, batch_spec: BatchSpec) -> None:
        """See `LinenTask.check_batch`."""
        if "tokens" not in batch_spec:
            raise ValueError(f"the batch has {sorted(batch_spec)} and no 'tokens'; a language model needs text data")
        layout.check_sequence(batch_spec["tokens"].shape[1] - 1)
        self._kernel(batch_spec)

    def notes(self, batch_spec: BatchSpec) -> tuple[str, ...]:
        """Return which kernel computes attention, and why."""
        return ("attention: {} ({})".format(*self._kernel(batch_spec)),)

    def _kernel(self, batch_spec: BatchSpec) -> kernels.Choice:
        rows, length = batch_spec["tokens"].shape
        query = jax.ShapeDtypeStruct((rows, length - 1, self.heads, self.head_dim), jnp.dtype(self.compute_dtype))
        return kernels.choose(self.attention, query, length - 1, self.kv_heads, self.pattern)

    @property
    def pattern(self) -> Pattern:
        """The keys that a query sees."""
        return Pattern(window=self.attention_window, soft_cap=self.attention_soft_cap)

    def loss(
        self, variables: dict[str, Any], batch: Batch, *, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[dict[str, Any], Metrics]]:
        """Return mean nats per real target (0 for an empty batch), model state, and metrics as (total, weight).

        With `balance_rate` the state has of each router the bias [X] and, while micro-batches of a step are added, the
        load of the experts.

        metrics: "loss", nats over targets, in training plus z_loss and the routers' losses; "bits_per_character", bits
        over the characters that begin in the targets (ends of documents cost bits and have no characters); "accuracy";
        with z_loss also "z_loss", the mean of log(Z)^2; with experts also those of `moe.router_metrics`.
        """
        del key  # no dropout
        x_BxTxE, head_VxE, routing = self._apply(variables, batch)
        real_BxT = real_targets(batch["segments"])
        losses = token_losses(x_BxTxE, head_VxE, batch["tokens"][:, 1:], real_BxT, self.loss_chunks)
        objective, targets = losses.nats, losses.count
        z_metrics = {"z_loss": (losses.z, targets)} if self.z_loss else {}
        routers = {} if routing is None else moe.router_metrics(routing, self.experts_per_token)
        if train and z_metrics:
            objective += self.z_loss * losses.z
        if train and routers:
            for name in ("balance_loss", "router_z_loss"):
                total_of_routers, inputs = routers[name]
                objective += targets * getattr(self, name) * total_of_routers / jnp.maximum(inputs, 1)
        characters = jnp.where(real_BxT, batch["characters"][:, 1:], 0).sum(dtype=jnp.float32)
        metrics = {
            "loss": (objective, targets),
            "bits_per_character": (losses.nats / np.log(2), characters),
            "accuracy": (losses.correct, targets),
            **z_metrics,
            **routers,
        }
        if train:
            metrics["real_tokens"] = real_tokens(batch["segments"][:, 1:])
        state = {name: value for name, value in variables.items() if name != "params"}
        if train and self._has_biases and routing is not None:
            routers_state = variables["routers"]
            state = {"routers": routers_state | {"load": routers_state["load"] + routing["assigned"]}}
        return objective / jnp.maximum(targets, 1), (state, metrics)

    def logits(self, variables: dict[str, Any], batch: Batch) -> tuple[jax.Array, moe.Routing | None]:
        """Return predictions for the inputs `tokens[:, :-1]`, float32 [B, T, V], and the sums of `moe.route`."""
        x_BxTxE, head_VxE, routing = self._apply(variables, batch)
        return token_logits(x_BxTxE, head_VxE), routing

    def _apply(self, variables: dict[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array, moe.Routing | None]:
        inputs = (batch[name][:, :-1] for name in ("tokens", "segments", "positions"))
        bias_LxX = variables["routers"]["bias"] if self._has_biases else None
        result: Any = Transformer(self).apply({"params": variables["params"]}, *inputs, bias_LxX)
        return result

    def flops(self, batch_spec: BatchSpec) -> float:
        """Return the training FLOPs of one batch: 6 N tokens + 12 layers S H D tokens + 6 E V tokens.

        N counts the parameters of the blocks' matmuls, of experts those that a token uses. S is the mean number of
        positions that a token sees, as if a row were one document: (T + 1) / 2 without a window. Recomputation by
        remat, norms and softmaxes are not counted, as is usual for MFU.
        """
        sequence = batch_spec["tokens"].shape[1] - 1
        most = min(self.attention_window or sequence, sequence)
        return self._flops(batch_spec, seen=most - most * (most - 1) / (2 * sequence))

    def square_flops(self, batch_spec: BatchSpec) -> float:
        """Return `flops` with S = T, as PaLM counts (arXiv 2204.02311, appendix B), also with a window."""
        return self._flops(batch_spec, seen=batch_spec["tokens"].shape[1] - 1)

    def _flops(self, batch_spec: BatchSpec, seen: float) -> float:
        rows, length = batch_spec["tokens"].shape
        sequence = length - 1
        attention = 2 * self.embed_dim * self.head_dim * (self.heads + self.kv_heads)
        used = self.experts_per_token + self.shared_experts
        widths = (self.layers - self.routed_blocks) * self.mlp_dim + self.routed_blocks * used * self.expert_width
        blocks = self.layers * attention + self.embed_dim * (3 * widths + self.routed_blocks * self.experts)
        per_token = 6 * blocks
        per_token += 12 * self.layers * seen * self.heads * self.head_dim
        per_token += 6 * self.embed_dim * self.vocab_size
        return float(per_token * rows * sequence)


class Transformer(nn.Module):
    """Maps tokens, segments and positions [B, T] to what the head [V, E] multiplies, [B, T, E]."""

    task: LMTask

    @nn.compact
    def __call__(
        self,
        tokens_BxT: jax.Array,
        segments_BxT: jax.Array,
        positions_BxT: jax.Array,
        bias_LxX: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, moe.Routing | None]:
        """Return [B, T, E], the head [V, E] and, with experts, the sums [layers, ...] of `moe.route`."""
        task = self.task
        dtype = jnp.dtype(task.compute_dtype)

        def table(name: str) -> jax.Array:
            init = partitioned(nn.initializers.normal(EMBEDDING_STD), "vocab", "embed")
            return self.param(name, init, (task.vocab_size, task.embed_dim))

        embedding_VxE = table("embedding")
        tokens_BxT, segments_BxT, positions_BxT = (zigzag(x) for x in (tokens_BxT, segments_BxT, positions_BxT))
        x_BxTxE = shard_batch(look_up(embedding_VxE, tokens_BxT, dtype), SEQUENCE_AXIS)
        rotation = rotary_angles(positions_BxT, task.head_dim, task.rope_theta)

        routed, routing = task.routed_blocks, None
        run = functools.partial(run_layers, Block, remat=task.remat)
        if dense := task.layers - routed:
            name = "dense_layers" if routed else "layers"
            x_BxTxE, _ = run((task, False), x_BxTxE, segments_BxT, rotation, layers=dense, name=name)
        if routed:
            biases = () if bias_LxX is None else (bias_LxX,)
            x_BxTxE, routing = run((task, True), x_BxTxE, segments_BxT, rotation, layers=routed, per_layer=biases)
        x_BxTxE = shard_batch(natural(rms_norm("final_norm", dtype)(x_BxTxE)), SEQUENCE_AXIS)
        head_VxE = embedding_VxE if task.tied_head else table("head")
        return x_BxTxE, head_VxE.astype(dtype), routing


class Block(nn.Module):
    """Attention and SwiGLU (or experts), each applied to the normed residual stream [B, T, E] and added to it."""

    task: LMTask
    routed: bool  # whether it has experts

    @nn.compact
    def __call__(
        self, x_BxTxE: jax.Array, segments_BxT: jax.Array, rotation: Rotation, bias_X: jax.Array | None = None
    ) -> tuple[jax.Array, moe.Routing | None]:
        """Return the residual stream after this layer, and the sums of its router if it has experts."""
        task = self.task
        dtype = jnp.dtype(task.compute_dtype)
        writers = 2 * task.layers  # two parts of each layer
        sizes = (task.heads, task.kv_heads, task.head_dim, task.embed_dim)
        layer = Attention(*sizes, writers, dtype, name="attention")
        normed_BxTxE = rms_norm("attention_norm", dtype)(x_BxTxE)
        query, (key, value) = layer.queries(normed_BxTxE, rotation), layer.keys_values(normed_BxTxE, rotation)
        knobs = {"pattern": task.pattern, "block": task.attention_block, "kernel": task.attention}
        x_BxTxE += layer.project(attention(query, key, value, segments_BxT, **knobs, zigzag=True))
        normed_BxTxE = rms_norm("mlp_norm", dtype)(x_BxTxE)
        if self.routed:
            mlp = moe.RoutedSwiGLU(
                task.experts,
                task.experts_per_token,
                task.expert_width,
                task.shared_experts * task.expert_width,
                task.router,
                task.router_scale,
                task.expert_room,
                writers,
                dtype,
                name="moe",
            )
            added_BxTxE, routing = mlp(normed_BxTxE, segments_BxT > 0, bias_X)
        else:
            added_BxTxE, routing = MLP(task.mlp_dim, True, writers, dtype, name="mlp")(normed_BxTxE), None
        return shard_batch(x_BxTxE + added_BxTxE, SEQUENCE_AXIS), routing
