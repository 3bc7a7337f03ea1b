"""The task of a decoder-only language model (`decoder`): loss, metrics, continuations, and Hugging Face folders.

Shapes in names: B batch, T sequence, E embed, V vocab, L layers with experts, X experts.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import layout, lora
from .decoder import cache as caches
from .decoder import moe
from .decoder.cache import Cache
from .decoder.options import DecoderOptions
from .decoder.transformer import Transformer
from .hf import families, matching, peft
from .hf.tensors import Tensors
from .kernels import attention as kernels
from .linen_task import Batch, BatchSpec, LinenTask, Metrics, check_options
from .vocabulary import real_targets, real_tokens, token_logits, token_losses, token_scores

# Last names of parameters that are used in float32; all others are cast to the compute dtype.
_EXACT = ("bias", "router", "scale", "sinks")


@dataclasses.dataclass(frozen=True)
class LMTask(DecoderOptions, LinenTask):
    """Next-token prediction on packed rows.

    A batch holds int32 arrays: tokens, segments (0 is padding) and positions [B, T + 1], and bytes [B], of the text of
    the targets. Inputs are `[:, :-1]` and targets `[:, 1:]`; a target counts if its segment equals its input's and is
    not 0, and if `counted` [B, T + 1], which a batch may have, is 1 for it.
    """

    z_loss: float = 0.0  # weight of log(Z)^2 in the training loss (PaLM: 1e-4); limits drift of the logits
    loss_chunks: int = 0  # parts of the vocabulary whose logits are computed in turn, to save memory; 0: one
    balance_loss: float = 0.01  # weight of the loss that balances the load of experts (Switch: 1e-2)
    router_z_loss: float = 0.001  # weight of the routers' log(Z)^2 (ST-MoE: 1e-3); limits drift of their logits
    lora_rank: int = 0  # rank of adapters, which are then trained in place of all other parameters (arXiv 2106.09685)
    lora_alpha: float = 16.0  # what the adapters add is multiplied by lora_alpha / lora_rank
    lora_targets: tuple[str, ...] = ("query", "key", "value", "out", "gate", "up", "down")  # layers with an adapter

    def __post_init__(self):
        super().__post_init__()
        check_options(self, not_negative="balance_loss lora_alpha lora_rank loss_chunks router_z_loss z_loss")

    def boxed(self, key: jax.Array) -> Any:
        """See `LinenTask.boxed`. Axes: layers, experts, embed, mlp, heads, kv_heads, kv (in a head), vocab, norm."""
        row = jnp.zeros((1, 2), jnp.int32)
        # The row is too short for a kernel; parameters do not depend on it.
        with self._adapted():
            variables = Transformer(dataclasses.replace(self, attention="xla")).init(key, row, row, row)
        if self.adapters:
            variables = self.adapters.split(dict(variables), jnp.dtype(self.compute_dtype), _EXACT)
        if not self.has_router_biases:
            return variables
        zeros_LxX = jnp.zeros((self.routed_blocks, self.experts))
        names = ("bias", "load") if self.balance_rate else ("bias",)
        return {**variables, "routers": dict.fromkeys(names, zeros_LxX)}

    @property
    def adapters(self) -> lora.Adapters | None:
        """The adapters that are trained, None if all parameters are."""
        return lora.Adapters(self.lora_rank, self.lora_alpha, self.lora_targets) if self.lora_rank else None

    def _adapted(self) -> contextlib.AbstractContextManager[None]:
        return self.adapters.attached() if self.adapters else contextlib.nullcontext()

    def settle(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """Move the routers' biases by the load of the experts in all micro-batches, and reset the load."""
        if "load" not in model_state.get("routers", ()):
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
        query = jax.ShapeDtypeStruct((rows, length - 1, self.heads, self.score_width), jnp.dtype(self.compute_dtype))
        asked = {"sinks": self.attention_sinks, "value_dim": self.value_width}
        return kernels.choose(self.attention, query, length - 1, self.kv_heads, self.pattern(self.kinds[0]), **asked)

    def loss(
        self, variables: dict[str, Any], batch: Batch, *, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[dict[str, Any], Metrics]]:
        """Return mean nats per real target (0 for an empty batch), model state, and metrics as (total, weight).

        The state has of each router with a bias the bias [X] and, with `balance_rate`, the load of the experts while
        micro-batches of a step are added.

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
        state = {name: value for name, value in variables.items() if name not in ("params", "frozen")}
        if train and self.experts and self.balance_rate and routing is not None:
            routers_state = variables["routers"]
            state = {"routers": routers_state | {"load": routers_state["load"] + routing["assigned"]}}
        return objective / jnp.maximum(targets, 1), (state, metrics)

    def scores(self, variables: dict[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array]:
        """See `Scoring.scores`."""
        x_BxTxE, head_VxE, _ = self._apply(variables, batch)
        return token_scores(x_BxTxE, head_VxE, batch["tokens"][:, 1:], self.logit_soft_cap)

    def logits(self, variables: dict[str, Any], batch: Batch) -> tuple[jax.Array, moe.Routing | None]:
        """Return predictions for the inputs `tokens[:, :-1]`, float32 [B, T, V], and the sums of `moe.route`."""
        x_BxTxE, head_VxE, routing = self._apply(variables, batch)
        return token_logits(x_BxTxE, head_VxE, self.logit_soft_cap), routing

    def _apply(self, variables: dict[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array, moe.Routing | None]:
        inputs = (batch[name][:, :-1] for name in ("tokens", "segments", "positions"))
        return self._transformer(variables, *inputs)[:3]

    def _transformer(self, variables: dict[str, Any], *inputs: Any, cache: Cache | None = None) -> Any:
        bias_LxX = variables["routers"]["bias"] if self.has_router_biases else None
        # A kernel that was named for the rows of training need not fit prompts.
        task = self if cache is None else dataclasses.replace(self, attention="auto")
        with self._adapted():
            return Transformer(task).apply({"params": lora.joined(variables)}, *inputs, bias_LxX, cache)

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
        inputs, empty = caches.of_prompts(tokens_BxT, real_BxT)
        x_BxTxE, head_VxE, _, layers = self._transformer(variables, *inputs, cache=empty)
        cache = caches.with_prompts(empty, inputs[1], layers, slots)
        return token_logits(x_BxTxE[:, -1:], head_VxE, self.logit_soft_cap)[:, 0], cache

    def decode(self, variables: dict[str, Any], tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Return the predictions after one more token of each row, float32 [B, V], and the cache with it.

        Donate the cache: its keys and values change in place.
        """
        inputs = caches.of_tokens(tokens_B, cache)
        x_Bx1xE, head_VxE, _, layers = self._transformer(variables, *inputs, cache=cache)
        cache = caches.with_tokens(cache, inputs[1], layers)
        return token_logits(x_Bx1xE, head_VxE, self.logit_soft_cap)[:, 0], cache

    @classmethod
    def knobs_of_folder(cls, config: Mapping[str, Any], adapter: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the knobs of the task of a Hugging Face folder, given config.json and, of PEFT, adapter_config.json.

        Raises:
          ValueError: the family is not known, or has a property that no knob expresses.
        """
        return families.knobs(config) | (peft.knobs(adapter, config["model_type"]) if adapter else {})

    def folder_tensors(self, config: Mapping[str, Any]) -> dict[str, Tensors]:
        """Return path of each parameter -> its tensors in a Hugging Face folder with this config.json.

        Raises:
          ValueError: the model of the folder is not this task.
        """
        return matching.tensors(config, dataclasses.asdict(self))

    def adapter_tensors(self, config: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Tensors]:
        """Return path of each adapter's parameter -> its tensors in a PEFT folder with this adapter_config.json.

        Raises:
          ValueError: the adapters of the folder are not those of this task.
        """
        return matching.adapter_tensors(config, adapter, dataclasses.asdict(self))

    def adapter_config(self, model_type: str) -> dict[str, Any]:
        """Return the adapter_config.json of this task, {} without adapters."""
        return peft.config(dataclasses.asdict(self), model_type) if self.lora_rank else {}

    def merged(
        self, path: str, place: tuple[slice, ...], values: np.ndarray, read: Callable[[str], np.ndarray]
    ) -> np.ndarray:
        """Return a part of a frozen parameter with what its adapter adds; see `Exchanged`."""
        layer, _, last = path.rpartition("/")
        if not self.adapters or last != "kernel" or layer.rpartition("/")[2] not in self.lora_targets:
            return values
        return self.adapters.merged(values, place, *(read(f"{layer}/{name}") for name in (lora.A, lora.B)))

    def folder_config(self, model_type: str = "") -> dict[str, Any]:
        """Return a config.json for this task, of the first family that fits or of the one given.

        Raises:
          ValueError: no family has all knobs of this task.
        """
        return matching.config(dataclasses.asdict(self), model_type)

    def folder_state(self, config: Mapping[str, Any]) -> dict[str, Tensors]:
        """Return path of each array of the model state -> its tensors in a folder with this config.json."""
        return families.state(dataclasses.asdict(self), config["model_type"])

    def folder_may_have(self, name: str, config: Mapping[str, Any]) -> bool:
        """Return whether a folder with this config.json may have a tensor that holds no parameter."""
        return families.unused(name, config)

    def flops(self, batch_spec: BatchSpec) -> float:
        """Return the training FLOPs of one batch: 6 N tokens + 12 S H D tokens + 6 E V tokens, D of keys and values.

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
        used = self.experts_per_token + self.shared_experts
        widths = (self.layers - self.routed_blocks) * self.mlp_dim + self.routed_blocks * used * self.expert_width
        blocks = self.layers * self._attention_weights + self.embed_dim * (
            3 * widths + self.routed_blocks * self.experts
        )
        # Kernels that are frozen have no gradient: a third of the work of their products.
        per_token = (4 if self.adapters else 6) * (blocks + self.embed_dim * self.vocab_size)
        per_token += 6 * seen * self.heads * (self.score_width + self.value_width)
        if self.adapters:
            trained = jax.eval_shape(lambda: self.boxed(jax.random.key(0))["params"])
            per_token += 6 * sum(leaf.size for leaf in jax.tree.leaves(trained))
        return float(per_token * rows * sequence)

    @property
    def _attention_weights(self) -> int:
        """Number of weights of the matmuls of a layer's attention, apart from those of scores and values."""
        if not self.latent_dim:
            return 2 * self.embed_dim * self.head_dim * (self.heads + self.kv_heads)
        inputs = self.query_latent_dim or self.embed_dim
        down = self.embed_dim * (self.query_latent_dim + self.latent_dim + self.rope_dim)
        up = inputs * self.score_width + self.latent_dim * (self.head_dim + self.value_width)
        return down + self.heads * (up + self.value_width * self.embed_dim)
