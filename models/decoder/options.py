"""The options of a decoder-only Transformer: every knob that its parameters and its logits depend on."""

import dataclasses

from ..attention import Pattern
from ..kernels import attention as kernels
from ..linen_task import check_options
from ..modules import GATES, QK_NORMS
from ..rotary import parse_scaling, score_factor
from . import moe

KINDS = ("local", "global")
NORMS = ("pre", "post", "sandwich")


@dataclasses.dataclass(frozen=True)
class DecoderOptions:
    """Sizes and options of the Transformer, and how it is computed."""

    vocab_size: int = 4096  # number of tokens; must equal data.vocab_size
    layers: int = 4  # blocks of attention and MLP
    embed_dim: int = 256  # width of the residual stream
    heads: int = 4  # query heads
    kv_heads: int = 4  # key and value heads; heads / kv_heads query heads share each
    head_dim: int = 64  # width of a head; even, for rotary positions
    mlp_dim: int = 768  # hidden width of the MLP, usually 8/3 of embed_dim
    activation: str = "silu"  # of the MLP's gate: "silu" (SwiGLU), "gelu" (GeGLU, Gemma), arXiv 2002.05202
    norms: str = "pre"  # RMSNorm before each part ("pre"), after it ("post", OLMo 2), or both ("sandwich", Gemma 2)
    norm_epsilon: float = 1e-6  # added to the mean square in every RMSNorm but of latents (Llama 3: 1e-5)
    qkv_bias: bool = False  # biases of queries, keys and values (Qwen 2)
    qk_norm: str = ""  # RMSNorm of queries and keys: "head", each (Qwen 3, Gemma 3); "all", all heads together (OLMo 2)
    embedding_scale: float = 1.0  # factor of the embeddings on input (Gemma: sqrt(embed_dim))
    rope_theta: float = 10_000.0  # longest rotary wavelength / 2 pi; larger for longer sequences
    local_rope_theta: float = 0.0  # rope_theta of local layers, without scaling (Gemma 3: 1e4); 0 is that of all
    rope_scaling: str = ""  # "linear factor=8", "llama3 factor=8 original=8192" or "yarn factor=4 original=32768"
    rope_fraction: float = 1.0  # share of a head's dimensions that is rotated (GPT-NeoX: 0.25)
    latent_dim: int = 0  # width of a token's latent, of which keys and values are made (DeepSeek-V3: 512); 0 for none
    query_latent_dim: int = 0  # with latent_dim, width of a latent of which queries are made (DeepSeek-V3: 1536)
    rope_dim: int = 0  # with latent_dim, rotated dimensions of queries and keys, beside head_dim (DeepSeek-V3: 64)
    value_dim: int = 0  # with latent_dim, width of a head's values (DeepSeek-V3: 128); 0 is head_dim
    tied_head: bool = True  # use the embedding as output head; saves vocab_size * embed_dim parameters
    remat: str = "none"  # recompute in the backward pass: none, full, dots, minimal, best, or names of values to keep
    compute_dtype: str = "float32"  # of activations and matmuls; "bfloat16" on accelerators
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
    router_scale: float = 1.0  # factor of the experts' weights (DeepSeek-V3: 2.5)
    router_normed: bool = True  # scale the weights of several experts to a sum of 1
    router_groups: int = 1  # groups of consecutive experts (DeepSeek-V3: 8)
    groups_per_token: int = 1  # groups whose experts a token may use (DeepSeek-V3: 4)
    router_bias: bool = False  # biases of the choice of experts, which only balance_rate moves
    expert_room: float = 1.25  # rows that a device can send to another at once / mean; a larger load takes more rounds
    balance_rate: float = 0.0  # step of biases that balance the load of experts (DeepSeek-V3: 1e-3); 0 for none

    def __post_init__(self):
        check_options(
            self,
            positive="vocab_size layers embed_dim heads kv_heads head_dim mlp_dim router_groups groups_per_token",
            not_negative="attention_block attention_scale attention_soft_cap attention_window balance_rate "
            "dense_layers expert_dim experts latent_dim local_rope_theta logit_soft_cap query_latent_dim rope_dim "
            "shared_experts value_dim",
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
        self._check_latents()
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
        self._check_groups()
        if self.experts and self.dense_layers >= self.layers:
            raise ValueError(f"task.dense_layers={self.dense_layers}: must be below task.layers={self.layers}")
        for name in ("embedding_scale", "expert_room", "norm_epsilon", "rope_theta", "router_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"task.{name}={getattr(self, name)}: must be above 0")

    def _check_latents(self) -> None:
        if not self.latent_dim:
            for name in ("query_latent_dim", "rope_dim", "value_dim"):
                if value := getattr(self, name):
                    raise ValueError(f"task.{name}={value}: only latent attention has it. Set task.latent_dim")
            return
        if self.rope_dim < 2 or self.rope_dim % 2:
            raise ValueError(f"task.rope_dim={self.rope_dim}: must be even and at least 2 with task.latent_dim")
        if self.kv_heads != self.heads:
            raise ValueError(f"task.kv_heads={self.kv_heads}: must be task.heads={self.heads} with task.latent_dim")
        for name, value in (("qkv_bias", False), ("qk_norm", ""), ("rope_fraction", 1.0)):
            if getattr(self, name) != value:
                raise ValueError(f"task.{name}={getattr(self, name)!r}: must be {value!r} with task.latent_dim")

    def _check_groups(self) -> None:
        groups, used = self.router_groups, self.groups_per_token
        if used > groups:
            raise ValueError(f"task.groups_per_token={used}: must be at most task.router_groups={groups}")
        if groups == 1:
            return
        if self.experts % groups or self.experts < 2 * groups:
            raise ValueError(
                f"task.router_groups={groups}: must split task.experts={self.experts} into equal groups of at least 2"
            )
        if self.experts_per_token > (most := used * self.experts // groups):
            raise ValueError(
                f"task.experts_per_token={self.experts_per_token}: must be at most the {most} experts of "
                f"task.groups_per_token={used}"
            )

    @property
    def routed_blocks(self) -> int:
        """Number of layers with experts, the last ones."""
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def expert_width(self) -> int:
        """Hidden width of an expert."""
        return self.expert_dim or self.mlp_dim

    @property
    def expert_router(self) -> moe.Router:
        """The options of the choice of experts."""
        return moe.Router(
            self.router,
            self.experts_per_token,
            self.router_normed,
            self.router_scale,
            self.router_groups,
            self.groups_per_token,
        )

    @property
    def has_router_biases(self) -> bool:
        """Whether routers have biases."""
        return self.experts > 0 and (self.router_bias or self.balance_rate > 0)

    @property
    def score_width(self) -> int:
        """Width of queries and keys."""
        return self.head_dim + self.rope_dim

    @property
    def value_width(self) -> int:
        """Width of values."""
        return self.value_dim or self.head_dim

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer, one of `KINDS`."""
        pattern = self.layer_pattern or ("local" if self.attention_window else "global",)
        return tuple(pattern[layer % len(pattern)] for layer in range(self.layers))

    def pattern(self, kind: str) -> Pattern:
        """Return the keys that a query sees in a layer of this kind."""
        window = self.attention_window if kind == "local" else 0
        scale = self.attention_scale
        if self.latent_dim:
            scaling = "" if kind == "local" and self.local_rope_theta else self.rope_scaling
            scale = (scale or self.score_width**-0.5) * score_factor(scaling)
        return Pattern(True, window, self.attention_soft_cap, scale)
