"""Tables of the families: which field of config.json is which option of the decoder, which tensor is which parameter.

A field that is in no table of its family is an error, so that nothing that matters is ignored. Knobs that no table
names keep their defaults. Sources: the configuration and modeling files of these families in `transformers`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from ..rotary import parse_scaling
from . import rotations
from .tensors import Tensors

Config = Mapping[str, Any]
Knobs = dict[str, Any]

# Knobs that do not change what a model computes.
FREE = ("attention", "attention_block", "compute_dtype", "expert_room", "remat")

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
}
_KV_HEADS, _HEAD_DIM = "num_key_value_heads", "head_dim"
# Fields that do not change the logits: of tokens, training, generation, caches and the program that wrote the file.
_IGNORED = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",  # of training; 0 in all published models
        "bos_token_id",
        "cache_implementation",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "max_position_embeddings",  # a bound of callers; a scaled rotation has its own length
        "model_type",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_ROTARY = frozenset({"rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq"})

_EMBEDDINGS = {
    "embedding": "model.embed_tokens.weight: V E",
    "head": "lm_head.weight: V E",
    "final_norm/scale": "model.norm.weight: E",
}
_ATTENTION = {
    "layers/attention/query/kernel": "model.layers.{L}.self_attn.q_proj.weight: H*D E -> E H D",
    "layers/attention/key/kernel": "model.layers.{L}.self_attn.k_proj.weight: K*D E -> E K D",
    "layers/attention/value/kernel": "model.layers.{L}.self_attn.v_proj.weight: K*D E -> E K D",
    "layers/attention/out/kernel": "model.layers.{L}.self_attn.o_proj.weight: E H*D -> H D E",
}
_BIASES = {
    "layers/attention/query/bias": "model.layers.{L}.self_attn.q_proj.bias: H*D -> H D",
    "layers/attention/key/bias": "model.layers.{L}.self_attn.k_proj.bias: K*D -> K D",
    "layers/attention/value/bias": "model.layers.{L}.self_attn.v_proj.bias: K*D -> K D",
}
_HEAD_NORMS = {
    "layers/attention/query_norm/scale": "model.layers.{L}.self_attn.q_norm.weight: D",
    "layers/attention/key_norm/scale": "model.layers.{L}.self_attn.k_norm.weight: D",
}
_WHOLE_NORMS = {
    "layers/attention/query_norm/scale": "model.layers.{L}.self_attn.q_norm.weight: H*D -> H D",
    "layers/attention/key_norm/scale": "model.layers.{L}.self_attn.k_norm.weight: K*D -> K D",
}
_MLP = {
    "layers/mlp/gate/kernel": "model.layers.{L}.mlp.gate_proj.weight: M E -> E M",
    "layers/mlp/up/kernel": "model.layers.{L}.mlp.up_proj.weight: M E -> E M",
    "layers/mlp/down/kernel": "model.layers.{L}.mlp.down_proj.weight: E M -> M E",
}
_EXPERTS = {
    "layers/moe/router": "model.layers.{L}.block_sparse_moe.gate.weight: X E -> E X",
    "layers/moe/gate": "model.layers.{L}.block_sparse_moe.experts.{X}.w1.weight: M E -> E M",
    "layers/moe/up": "model.layers.{L}.block_sparse_moe.experts.{X}.w3.weight: M E -> E M",
    "layers/moe/down": "model.layers.{L}.block_sparse_moe.experts.{X}.w2.weight: E M -> M E",
}
_PRE_NORMS = {
    "layers/attention_norm/scale": "model.layers.{L}.input_layernorm.weight: E",
    "layers/mlp_norm/scale": "model.layers.{L}.post_attention_layernorm.weight: E",
}
_POST_NORMS = {
    "layers/attention_post_norm/scale": "model.layers.{L}.post_attention_layernorm.weight: E",
    "layers/mlp_post_norm/scale": "model.layers.{L}.post_feedforward_layernorm.weight: E",
}


_SANDWICH_NORMS = {
    **_POST_NORMS,
    "layers/attention_norm/scale": "model.layers.{L}.input_layernorm.weight: E",
    "layers/mlp_norm/scale": "model.layers.{L}.pre_feedforward_layernorm.weight: E",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """The table of a family.

    Attributes:
      architecture: name of its class in `transformers`.
      tensors: parameter -> text for `Tensors.parse`.
      defaults: fields that may be absent, with the values they then have.
      copied: further fields -> knobs that have their values; null is 0.
      knobs: knobs that are the same in all its models.
      required: fields that may be absent -> the only value that can be expressed.
      ignored: further fields that do not matter.
      own: further knobs, computed from a config with its defaults.
      own_fields: the reverse, fields computed from all knobs.
      norm_offset: number to add to the weights of norms.
    """

    architecture: str
    tensors: dict[str, str]
    defaults: dict[str, Any]
    copied: dict[str, str] = dataclasses.field(default_factory=dict)
    knobs: Knobs = dataclasses.field(default_factory=dict)
    required: dict[str, Any] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    own: Callable[[Config], Knobs] = lambda config: {}
    own_fields: Callable[[Knobs], dict[str, Any]] = lambda knobs: {}
    norm_offset: float = 0.0


def _gemma_knobs(config: Config) -> Knobs:
    layers, every = config["num_hidden_layers"], config["sliding_window_pattern"] or config["_sliding_window_pattern"]
    kinds = {"sliding_attention": "local", "full_attention": "global"}
    types = config["layer_types"] or [
        "full_attention" if every and number % every == 0 else "sliding_attention" for number in range(1, layers + 1)
    ]
    if len(types) != layers or not set(types) <= set(kinds):
        raise ValueError(f"config.json: layer_types={types}: must name {layers} of {', '.join(kinds)}")
    period = next(size for size in range(1, layers + 1) if all(types[i] == types[i % size] for i in range(layers)))
    local = {} if "sliding_attention" in types else {"local_rope_theta": 0.0}
    return local | {
        "layer_pattern": tuple(kinds[name] for name in types[:period]),
        "attention_scale": float(config["query_pre_attn_scalar"]) ** -0.5,
        "embedding_scale": math.sqrt(config["hidden_size"]),
    }


def _gemma_fields(knobs: Knobs) -> dict[str, Any]:
    pattern, scale = knobs["layer_pattern"] or ("global",), knobs["attention_scale"]
    names = {"local": "sliding_attention", "global": "full_attention"}
    return {
        "layer_types": [names[pattern[number % len(pattern)]] for number in range(knobs["layers"])],
        "query_pre_attn_scalar": _integer(scale**-2 if scale else knobs["head_dim"]),
    }


def _integer(number: float) -> float:
    return round(number) if math.isclose(number, round(number), rel_tol=1e-9) else number


_LLAMA = Family(
    "LlamaForCausalLM",
    _EMBEDDINGS | _ATTENTION | _MLP | _PRE_NORMS,
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False},
    required={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
)
_QWEN = dataclasses.replace(
    _LLAMA,
    required={"hidden_act": "silu", "use_sliding_window": False},
    ignored=frozenset({"max_window_layers", "sliding_window", "layer_types"}),  # of sliding windows
)
FAMILIES = {
    "llama": _LLAMA,
    "mistral": dataclasses.replace(
        _LLAMA,
        architecture="MistralForCausalLM",
        defaults=_LLAMA.defaults | {"sliding_window": 4096},
        copied={"sliding_window": "attention_window"},
        required={"hidden_act": "silu"},
    ),
    "qwen2": dataclasses.replace(
        _QWEN, architecture="Qwen2ForCausalLM", tensors=_LLAMA.tensors | _BIASES, knobs={"qkv_bias": True}
    ),
    "qwen3": dataclasses.replace(
        _QWEN,
        architecture="Qwen3ForCausalLM",
        tensors=_LLAMA.tensors | _HEAD_NORMS,
        defaults=_LLAMA.defaults | {"head_dim": 128},
        knobs={"qk_norm": "head"},
        required=_QWEN.required | {"attention_bias": False},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        _EMBEDDINGS | _ATTENTION | _WHOLE_NORMS | _MLP | _POST_NORMS,
        defaults=_LLAMA.defaults | {"rms_norm_eps": 1e-5},
        knobs={"qk_norm": "all", "norms": "post"},
        required={"hidden_act": "silu", "attention_bias": False},
    ),
    "mixtral": dataclasses.replace(
        _LLAMA,
        architecture="MixtralForCausalLM",
        tensors=_EMBEDDINGS | _ATTENTION | _EXPERTS | _PRE_NORMS,
        defaults=_LLAMA.defaults | {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
        copied={
            "sliding_window": "attention_window",
            "num_local_experts": "experts",
            "num_experts_per_tok": "experts_per_token",
        },
        required={"hidden_act": "silu"},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _EMBEDDINGS | _ATTENTION | _HEAD_NORMS | _MLP | _SANDWICH_NORMS,
        defaults={
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "tie_word_embeddings": True,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "layer_types": None,
            "sliding_window_pattern": None,
            "_sliding_window_pattern": 6,
        },
        copied={
            "sliding_window": "attention_window",
            "attn_logit_softcapping": "attention_soft_cap",
            "final_logit_softcapping": "logit_soft_cap",
        },
        knobs={"qk_norm": "head", "norms": "sandwich", "activation": "gelu"},
        required={
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "use_bidirectional_attention": False,
        },
        own=_gemma_knobs,
        own_fields=_gemma_fields,
        norm_offset=1.0,
    ),
}


def knobs(config: Config) -> Knobs:
    """Return the fields of `DecoderOptions` that a config.json determines.

    Raises:
      ValueError: the family is not known, or a field is missing, not known or has a value that no knob expresses.
    """
    family = _family(config)
    given = family.defaults | dict(config)
    for field in _SIZES:
        if not isinstance(given.get(field), int):
            raise ValueError(f"config.json: {field}={given.get(field)!r}: must be a whole number")
    known = {*_SIZES, _KV_HEADS, _HEAD_DIM, *family.defaults, *family.copied, *family.required, *family.ignored}
    for field, value in given.items():
        if value is not None and field not in known | _IGNORED | _ROTARY:
            raise ValueError(
                f"config.json: {field}={value!r}: is not known here for {config['model_type']!r}, and may change what "
                "the model computes. Remove it if it does not"
            )
    for field, value in family.required.items():
        if given.get(field) not in (None, value):
            raise ValueError(f"config.json: {field}={given[field]!r}: can only be {value!r} here")
    found: Knobs = {knob: given[field] for field, knob in _SIZES.items()}
    found["kv_heads"] = given.get(_KV_HEADS) or found["heads"]
    found["head_dim"] = given.get(_HEAD_DIM) or found["embed_dim"] // found["heads"]
    found["norm_epsilon"], found["tied_head"] = float(given["rms_norm_eps"]), given["tie_word_embeddings"]
    found |= {knob: given.get(field) or 0 for field, knob in family.copied.items()}
    return found | family.knobs | rotations.from_config(given) | family.own(given)


def config(task: Knobs, model_type: str) -> dict[str, Any]:
    """Return the config.json of a family with all knobs of a task; `knobs` of it are compared by the caller."""
    family = FAMILIES[model_type]
    fields = {field: task[knob] for field, knob in _SIZES.items()}
    fields |= {_KV_HEADS: task["kv_heads"], _HEAD_DIM: task["head_dim"]}
    fields |= {"rms_norm_eps": task["norm_epsilon"], "tie_word_embeddings": task["tied_head"]}
    fields |= {field: task[knob] or None for field, knob in family.copied.items()}
    fields |= {**family.required, **rotations.to_config(task, local="rope_local_base_freq" in family.defaults)}
    return {"architectures": [family.architecture], "model_type": model_type, **fields, **family.own_fields(task)}


def tensors(task: Knobs, model_type: str) -> dict[str, Tensors]:
    """Return the path of each parameter of a task -> its tensors in a folder of a family."""
    family = FAMILIES[model_type]
    return {
        path: Tensors.parse(text, sizes(task), family.norm_offset if path.endswith("norm/scale") else 0.0)
        for path, text in family.tensors.items()
        if path != "head" or not task["tied_head"]
    }


def sizes(task: Mapping[str, Any]) -> dict[str, int]:
    """Return the size of each axis of the tables."""
    axes = {"V": "vocab_size", "E": "embed_dim", "H": "heads", "K": "kv_heads", "D": "head_dim", "L": "layers"}
    return {axis: task[knob] for axis, knob in axes.items()} | {"M": task["mlp_dim"], "X": task["experts"]}


def unused(name: str) -> bool:
    """Return whether a folder may have a tensor that holds no parameter: a tied head, or frequencies of rotations."""
    return name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq")


def differences(needed: Knobs, given: Knobs) -> dict[str, tuple[Any, Any]]:
    """Return knob -> (value needed, value given) of the knobs that differ and matter."""
    return {
        knob: (value, given[knob])
        for knob, value in needed.items()
        if knob not in FREE and not _equal(knob, value, given[knob])
    }


def _equal(knob: str, a: Any, b: Any) -> bool:
    if knob == "rope_scaling":
        return parse_scaling(a) == parse_scaling(b)
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b


def _family(config: Config) -> Family:
    name = config.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"config.json: model_type={name!r}: is not known. Use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
