"""A decoder-only Transformer language model and its task.

RMSNorm before each part (or after it), rotary positions, a gated MLP, grouped-query attention, a scan over the layers.
Shapes in names and comments: B batch, T sequence, E embed, H query heads, K key-value heads, G = H / K, D head_dim,
M mlp, V vocab.

Parameters are float32; matmuls run in the compute dtype; norms, rotations, softmaxes and logits are float32.

Initialisation: kernels are truncated normal with variance 1 / fan_in; those that write into the residual stream
(attention/out, mlp/down) are divided by a further sqrt(2 * layers), as in GPT-2. Embeddings have standard deviation
0.02 and, with the default `embedding_scale`, are not scaled on input, as in GPT-2 and Llama: they are small compared
with what the layers add, so that a model with a tied head does not begin by repeating its input. A separate head has
0.02 too.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from . import kernels, layout, moe
from .attention import Earlier, KeysValues, Pattern, attend_with_cache, attention
from .hf import families
from .hf.tensors import Tensors
from .layout import SEQUENCE_AXIS, TENSOR_AXIS, natural, shard_batch, zigzag
from .linen_task import Batch, BatchSpec, LinenTask, Metrics, check_options
from .modules import EMBEDDING_STD, GATES, MLP, QK_NORMS, Attention, partitioned, rms_norm, run_pattern
from .rotary import Rotation, parse_scaling, rotary_angles
from .vocabulary import look_up, real_targets, real_tokens, token_logits, token_losses

KINDS = ("local", "global")
NORMS = ("pre", "post", "sandwich")


class Cache(NamedTuple):
    """The slots of a batch of rows whose continuation is generated.

    Attributes:
      layers: rotated keys and values, each [L, B, S, K, D], by the name of the stack of layers.
      segments: int32 [B, S], 1 for tokens, 0 for padding and empty slots.
      positions: int32 [B], number of tokens of each row; a row without tokens is ignored.
      filled: int32 scalar, number of slots that are no longer empty, the same for all rows.
    """

    layers: dict[str, KeysValues]
    segments: jax.Array
    positions: jax.Array
    filled: jax.Array


@dataclasses.dataclass(frozen=True)
class LMTask(LinenTask):
    """Next-token prediction on packed rows.

    A batch holds int32 arrays: tokens, segments (0 is padding) and positions [B, T + 1], and bytes [B], of the text of
    the targets. Inputs are `[:, :-1]` and targets `[:, 1:]`; a target counts if its segment equals its input's and is
    not 0, and if `counted` [B, T + 1], which a batch may have, is 1 for it.
    """

    vocab_size: int = 4096  # number of tokens; must equal data.vocab_size
    layers: int = 4  # blocks of attention and MLP
    embed_dim: int = 256  # width of the residual stream
    heads: int = 4  # query heads
    kv_heads: int = 4  # key and value heads; heads / kv_heads query heads share each
    head_dim: int = 64  # width of a head; even, for rotary positions
    mlp_dim: int = 768  # hidden width of the MLP, usually 8/3 of embed_dim
    activation: str = "silu"  # of the MLP's gate: "silu" (SwiGLU), "gelu" (GeGLU, Gemma), arXiv 2002.05202
    norms: str = "pre"  # RMSNorm before each part ("pre"), after it ("post", OLMo 2), or both ("sandwich", Gemma 2)
    norm_epsilon: float = 1e-6  # added to the mean square in every RMSNorm (Llama 3: 1e-5)
    qkv_bias: bool = False  # biases of queries, keys and values (Qwen 2)
    qk_norm: str = ""  # RMSNorm of queries and keys: "head", each (Qwen 3, Gemma 3); "all", all heads together (OLMo 2)
    embedding_scale: float = 1.0  # factor of the embeddings on input (Gemma: sqrt(embed_dim))
    rope_theta: float = 10_000.0  # longest rotary wavelength / 2 pi; larger for longer sequences
    local_rope_theta: float = 0.0  # rope_theta of local layers, without scaling (Gemma 3: 1e4); 0 is that of all
    rope_scaling: str = ""  # "linear factor=8", "llama3 factor=8 original=8192" or "yarn factor=4 original=32768"
    rope_fraction: float = 1.0  # share of a head's dimensions that is rotated (GPT-NeoX: 0.25)
    tied_head: bool = True  # use the embedding as output head; saves vocab_size * embed_dim parameters
    remat: str = "none"  # recompute in the backward pass: none, full, dots, minimal, best, or names of values to keep
    compute_dtype: str = "float32"  # of activations and matmuls; "bfloat16" on accelerators
    z_loss: float = 0.0  # weight of log(Z)^2 in the training loss (PaLM: 1e-4); limits drift of the logits
    loss_chunks: int = 0  # parts of the vocabulary whose logits are computed in turn, to save memory; 0: one
    attention: str = "auto"  # kernel: "xla", "splash" (TPU), "cudnn" (GPU), or "auto", the one that fits
    attention_block: int = 0  # queries whose scores are held at once (128 for long rows); 0: all, or a window's number
    attention_window: int = 0  # number of the last tokens that a token sees, with itself; 0 for all
    layer_pattern: tuple[str, ...] = ()  # "local" (attention_window) or "global" layers in turn; () makes all alike
    attention_sinks: bool = False  # a learned score of each head that joins the softmax and has no value (gpt-oss)
    attention_scale: float = 0.0  # factor of q k; 0 is head_dim ** -0.5 (Gemma: query_pre_attn_scalar ** -0.5)
    attention_soft_cap: float = 0.0  # limit of attention's scores, cap * tanh(score / cap) (Gemma 2: 50); 0 for none
    logit_soft_cap: float = 0.0  # limit of the logits, cap * tanh(logit / cap) (Gemma 2: 30); 0 for none
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
            not_negative="attention_block attention_scale attention_soft_cap attention_window balance_loss "
            "balance_rate dense_layers expert_dim experts local_rope_theta logit_soft_cap loss_chunks router_z_loss "
            "shared_experts z_loss",
            activation=GATES,
            attention=kernels.KERNELS,
            norms=NORMS,
            qk_norm=QK_NORMS,
            router=moe.ROUTERS,
        )
        if self.heads % self.kv_heads:
            raise ValueError(f"task.kv_heads={self.kv_heads}: must divide task.heads={self.heads}")
        if not set(self.layer_pattern) <= set(KINDS):
            raise ValueError(f"task.layer_pattern={self.layer_pattern}: use any of {', '.join(KINDS)}, or ()")
        if "local" in self.layer_pattern and not self.attention_window:
            raise ValueError("task.attention_window=0: local layers of task.layer_pattern need a window")
        if self.local_rope_theta and "local" not in self.kinds:
            raise ValueError(f"task.local_rope_theta={self.local_rope_theta}: task.layer_pattern has no local layers")
        parse_scaling(self.rope_scaling)
        rotated = int(self.head_dim * self.rope_fraction) if 0 < self.rope_fraction <= 1 else 0
        if rotated < 2 or rotated % 2:
            raise ValueError(
                f"task.rope_fraction={self.rope_fraction}: must be above 0, at most 1, and rotate an even number of "
                f"dimensions; of task.head_dim={self.head_dim} it rotates {rotated}"
            )
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"task.experts_per_token={self.experts_per_token}: must be 1 to task.experts={self.experts}"
            )
        if self.experts and self.dense_layers >= self.layers:
            raise ValueError(f"task.dense_layers={self.dense_layers}: must be below task.layers={self.layers}")
        for name in ("embedding_scale", "expert_room", "norm_epsilon", "rope_theta", "router_scale"):
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
        # Local and global layers have the same one: no kernel depends on the window.
        rows, length = batch_spec["tokens"].shape
        query = jax.ShapeDtypeStruct((rows, length - 1, self.heads, self.head_dim), jnp.dtype(self.compute_dtype))
        pattern = self.pattern(self.kinds[0])
        return kernels.choose(self.attention, query, length - 1, self.kv_heads, pattern, sinks=self.attention_sinks)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer, one of `KINDS`."""
        pattern = self.layer_pattern or ("local" if self.attention_window else "global",)
        return tuple(pattern[layer % len(pattern)] for layer in range(self.layers))

    def pattern(self, kind: str) -> Pattern:
        """Return the keys that a query sees in a layer of this kind."""
        window = self.attention_window if kind == "local" else 0
        return Pattern(True, window, self.attention_soft_cap, self.attention_scale)

    def loss(
        self, variables: dict[str, Any], batch: Batch, *, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[dict[str, Any], Metrics]]:
        """Return mean nats per real target (0 for an empty batch), model state, and metrics as (total, weight).

        With `balance_rate` the state has of each router the bias [X] and, while micro-batches of a step are added, the
        load of the experts.

        metrics: "loss", nats over targets, in training plus z_loss and the routers' losses; "bits_per_byte", bits
        over the bytes of the original text of the targets (ends of documents cost bits and have no bytes); "accuracy";
        with z_loss also "z_loss", the mean of log(Z)^2; with experts also those of `moe.router_metrics`.
        """
        del key  # no dropout
        x_BxTxE, head_VxE, routing = self._apply(variables, batch)
        real_BxT = real_targets(batch["segments"])
        if "counted" in batch:
            real_BxT &= batch["counted"][:, 1:] > 0
        losses = token_losses(
            x_BxTxE, head_VxE, batch["tokens"][:, 1:], real_BxT, self.loss_chunks, self.logit_soft_cap
        )
        objective, targets = losses.nats, losses.count
        z_metrics = {"z_loss": (losses.z, targets)} if self.z_loss else {}
        routers = {} if routing is None else moe.router_metrics(routing, self.experts_per_token)
        if train and z_metrics:
            objective += self.z_loss * losses.z
        if train and routers:
            for name in ("balance_loss", "router_z_loss"):
                total_of_routers, inputs = routers[name]
                objective += targets * getattr(self, name) * total_of_routers / jnp.maximum(inputs, 1)
        metrics = {
            "loss": (objective, targets),
            "bits_per_byte": (losses.nats / np.log(2), batch["bytes"].sum(dtype=jnp.float32)),
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
        return token_logits(x_BxTxE, head_VxE, self.logit_soft_cap), routing

    def _apply(self, variables: dict[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array, moe.Routing | None]:
        inputs = (batch[name][:, :-1] for name in ("tokens", "segments", "positions"))
        return self._transformer(variables, *inputs)[:3]

    def _transformer(self, variables: dict[str, Any], *inputs: Any, cache: Cache | None = None) -> Any:
        bias_LxX = variables["routers"]["bias"] if self._has_biases else None
        # A kernel that was named for the rows of training need not fit prompts.
        task = self if cache is None else dataclasses.replace(self, attention="auto")
        return Transformer(task).apply({"params": variables["params"]}, *inputs, bias_LxX, cache)

    def prefill(
        self, variables: dict[str, Any], tokens_BxT: jax.Array, real_BxT: jax.Array, slots: int
    ) -> tuple[jax.Array, Cache]:
        """Return the predictions after the last token of each row, float32 [B, V], and the cache.

        Args:
          variables: variables of the model.
          tokens_BxT: int32, rows of tokens with padding before or after them.
          real_BxT: bool, False for padding; a row may have no token.
          slots: size of the cache of a row, T + 1 or more.
        """
        length = real_BxT.shape[1]
        # Rows end in the last slot, so that all continue in the same one, and slots are as far apart as positions.
        behind_B = jnp.argmax(real_BxT[:, ::-1], axis=1)
        order_BxT = (jnp.arange(length) - behind_B[:, None]) % length
        tokens_BxT, real_BxT = (jnp.take_along_axis(x, order_BxT, axis=1) for x in (tokens_BxT, real_BxT))
        positions_B = real_BxT.sum(axis=1, dtype=jnp.int32)
        positions_BxT = jnp.maximum(jnp.arange(length) - (length - positions_B[:, None]), 0)
        empty_BxS = jnp.zeros((len(tokens_BxT), 0), jnp.int32)
        empty = Cache({}, empty_BxS, positions_B, jnp.int32(length))
        inputs = tokens_BxT, real_BxT.astype(jnp.int32), positions_BxT
        x_BxTxE, head_VxE, _, layers = self._transformer(variables, *inputs, cache=empty)

        def widened(x: jax.Array, axis: int) -> jax.Array:
            return jnp.pad(x, [(0, slots - length if each == axis else 0) for each in range(x.ndim)])

        layers = jax.tree.map(lambda x: _sharded(widened(x, 2)), layers)
        cache = empty._replace(layers=layers, segments=widened(inputs[1], 1))
        return token_logits(x_BxTxE[:, -1:], head_VxE, self.logit_soft_cap)[:, 0], cache

    def decode(self, variables: dict[str, Any], tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Return the predictions after one more token of each row, float32 [B, V], and the cache with it.

        Donate the cache: its keys and values change in place.
        """
        segments_Bx1 = (cache.positions > 0).astype(jnp.int32)[:, None]
        inputs = tokens_B[:, None], segments_Bx1, cache.positions[:, None]
        x_Bx1xE, head_VxE, _, new = self._transformer(variables, *inputs, cache=cache)

        def written(old: jax.Array, now: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, now, cache.filled, axis)

        cache = Cache(
            jax.tree.map(lambda old, now: _sharded(written(old, now, 2)), cache.layers, new),
            written(cache.segments, segments_Bx1, 1),
            cache.positions + segments_Bx1[:, 0],
            cache.filled + 1,
        )
        return token_logits(x_Bx1xE, head_VxE, self.logit_soft_cap)[:, 0], cache

    @classmethod
    def knobs_of_folder(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the knobs of the task of a Hugging Face folder, given its config.json.

        Raises:
          ValueError: the family is not known, or has a property that no knob expresses.
        """
        return families.knobs(config)

    def folder_tensors(self, config: Mapping[str, Any]) -> dict[str, Tensors]:
        """Return path of each parameter -> its tensors in a Hugging Face folder with this config.json.

        Raises:
          ValueError: the model of the folder is not this task.
        """
        needed = dataclasses.asdict(LMTask(**self.knobs_of_folder(config)))
        if unlike := families.differences(needed, dataclasses.asdict(self)):
            told = ", ".join(f"task.{knob}={value!r} (now {given!r})" for knob, (value, given) in unlike.items())
            raise ValueError(f"its model needs {told}")
        return families.tensors(needed, config["model_type"])

    def folder_config(self, model_type: str = "") -> dict[str, Any]:
        """Return a config.json for this task, of the first family that fits or of the one given.

        Raises:
          ValueError: no family has all knobs of this task.
        """
        given, nearest = dataclasses.asdict(self), (math.inf, "")
        if model_type not in ("", *families.FAMILIES):
            raise ValueError(f"--family={model_type}: use one of {', '.join(families.FAMILIES)}")
        for name in (model_type,) if model_type else families.FAMILIES:
            config = families.config(given, name)
            unlike = families.differences(dataclasses.asdict(LMTask(**self.knobs_of_folder(config))), given)
            if not unlike:
                return config
            told = ", ".join(f"task.{knob}={value!r} (now {now!r})" for knob, (value, now) in unlike.items())
            nearest = min(nearest, (len(unlike), f"{name}: {told}"))
        raise ValueError(f"no family of Hugging Face models has these knobs; the nearest would be {nearest[1]}")

    def folder_may_have(self, name: str) -> bool:
        """Return whether a folder may have a tensor that holds no parameter."""
        return families.unused(name)

    def flops(self, batch_spec: BatchSpec) -> float:
        """Return the training FLOPs of one batch: 6 N tokens + 12 S H D tokens + 6 E V tokens.

        N counts the parameters of the blocks' matmuls, of experts those that a token uses. S sums over the layers the
        mean number of positions that a token sees, as if a row were one document: (T + 1) / 2 without a window.
        Recomputation by remat, norms and softmaxes are not counted, as is usual for MFU.
        """
        sequence = batch_spec["tokens"].shape[1] - 1
        widest = [min(self.pattern(kind).window or sequence, sequence) for kind in self.kinds]
        return self._flops(batch_spec, seen=sum(most - most * (most - 1) / (2 * sequence) for most in widest))

    def square_flops(self, batch_spec: BatchSpec) -> float:
        """Return `flops` with S = layers T, as PaLM counts (arXiv 2204.02311, appendix B), also with a window."""
        return self._flops(batch_spec, seen=self.layers * (batch_spec["tokens"].shape[1] - 1))

    def _flops(self, batch_spec: BatchSpec, seen: float) -> float:
        rows, length = batch_spec["tokens"].shape
        sequence = length - 1
        attention = 2 * self.embed_dim * self.head_dim * (self.heads + self.kv_heads)
        used = self.experts_per_token + self.shared_experts
        widths = (self.layers - self.routed_blocks) * self.mlp_dim + self.routed_blocks * used * self.expert_width
        blocks = self.layers * attention + self.embed_dim * (3 * widths + self.routed_blocks * self.experts)
        per_token = 6 * blocks
        per_token += 12 * seen * self.heads * self.head_dim
        per_token += 6 * self.embed_dim * self.vocab_size
        return float(per_token * rows * sequence)


def _sharded(stack: jax.Array) -> jax.Array:
    """Shard cached keys or values [L, B, S, K, D] by rows and heads."""
    return jax.vmap(lambda x: shard_batch(x, None, TENSOR_AXIS))(stack)


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
        cache: Cache | None = None,
    ) -> tuple[jax.Array, jax.Array, moe.Routing | None, dict[str, KeysValues | None]]:
        """Return [B, T, E], the head [V, E] and, with experts, the sums [layers, ...] of `moe.route`.

        With a cache, whose slots precede those of the tokens, also keys and values [layers, B, T, K, D] of each stack.
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
            return rotary_angles(positions_BxT, task.head_dim, theta, scaling, task.rope_fraction)

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

    task: LMTask
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
        cached: KeysValues | None = None,
    ) -> tuple[jax.Array, tuple[moe.Routing | None, KeysValues | None]]:
        """Return the residual stream after this layer, and the sums of its router if it has experts.

        With `earlier` also keys and values of these slots, for the cache, which has those of the earlier slots if there
        are any.
        """
        task = self.task
        dtype = jnp.dtype(task.compute_dtype)
        writers = 2 * task.layers  # two parts of each layer
        norm = functools.partial(rms_norm, dtype=dtype, epsilon=task.norm_epsilon)
        before, after = task.norms in ("pre", "sandwich"), task.norms in ("post", "sandwich")

        sizes = (task.heads, task.kv_heads, task.head_dim, task.embed_dim)
        knobs = task.qkv_bias, task.qk_norm, task.norm_epsilon, task.attention_sinks
        layer = Attention(*sizes, writers, dtype, *knobs, name="attention")
        rotation, pattern = rotations[self.kind], task.pattern(self.kind)
        normed_BxTxE = norm("attention_norm")(x_BxTxE) if before else x_BxTxE
        query, (key, value) = layer.queries(normed_BxTxE, rotation), layer.keys_values(normed_BxTxE, rotation)
        if earlier is None or cached is None:
            run = {"pattern": pattern, "block": task.attention_block, "kernel": task.attention, "sinks": layer.sinks}
            mixed = attention(query, key, value, segments_BxT, **run, zigzag=True)
        else:
            mixed = attend_with_cache(query, (key, value), cached, segments_BxT, earlier, pattern, layer.sinks)
        added_BxTxE = layer.project(mixed)
        x_BxTxE += norm("attention_post_norm")(added_BxTxE) if after else added_BxTxE

        normed_BxTxE = norm("mlp_norm")(x_BxTxE) if before else x_BxTxE
        if self.routed:
            mlp = moe.RoutedMLP(
                task.experts,
                task.experts_per_token,
                task.expert_width,
                task.shared_experts * task.expert_width,
                task.activation,
                task.router,
                task.router_scale,
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
        kept = None if earlier is None else (natural(key), natural(value))
        return shard_batch(x_BxTxE + added_BxTxE, SEQUENCE_AXIS), (routing, kept)
