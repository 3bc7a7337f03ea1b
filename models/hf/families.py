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
FREE = ("attention", "attention_block", "balance_rate", "compute_dtype", "expert_room", "remat")

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
_LATENTS = {
    "layers/attention/query/kernel": "model.layers.{L}.self_attn.q_proj.weight: H*Q E -> E H Q",
    "layers/attention/query_down/kernel": "model.layers.{L}.self_attn.q_a_proj.weight: N E -> E N",
    "layers/attention/query_norm/scale": "model.layers.{L}.self_attn.q_a_layernorm.weight: N",
    "layers/attention/query_up/kernel": "model.layers.{L}.self_attn.q_b_proj.weight: H*Q N -> N H Q",
    "layers/attention/latent_down/kernel": "model.layers.{L}.self_attn.kv_a_proj_with_mqa.weight: A E -> E A",
    "layers/attention/latent_norm/scale": "model.layers.{L}.self_attn.kv_a_layernorm.weight: C",
    "layers/attention/latent_up/kernel": "model.layers.{L}.self_attn.kv_b_proj.weight: H*W C -> C H W",
    "layers/attention/out/kernel": "model.layers.{L}.self_attn.o_proj.weight: E H*U -> H U E",
}
_EXPERTS = {
    "layers/moe/router": "model.layers.{L}.block_sparse_moe.gate.weight: X E -> E X",
    "layers/moe/gate": "model.layers.{L}.block_sparse_moe.experts.{X}.w1.weight: F E -> E F",
    "layers/moe/up": "model.layers.{L}.block_sparse_moe.experts.{X}.w3.weight: F E -> E F",
    "layers/moe/down": "model.layers.{L}.block_sparse_moe.experts.{X}.w2.weight: E F -> F E",
}
_SHARED_EXPERTS = {
    "layers/moe/router": "model.layers.{L}.mlp.gate.weight: X E -> E X",
    "layers/moe/gate": "model.layers.{L}.mlp.experts.{X}.gate_proj.weight: F E -> E F",
    "layers/moe/up": "model.layers.{L}.mlp.experts.{X}.up_proj.weight: F E -> E F",
    "layers/moe/down": "model.layers.{L}.mlp.experts.{X}.down_proj.weight: E F -> F E",
    "layers/moe/shared/gate/kernel": "model.layers.{L}.mlp.shared_experts.gate_proj.weight: S E -> E S",
    "layers/moe/shared/up/kernel": "model.layers.{L}.mlp.shared_experts.up_proj.weight: S E -> E S",
    "layers/moe/shared/down/kernel": "model.layers.{L}.mlp.shared_experts.down_proj.weight: E S -> S E",
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
      state: array of the model state -> text for `Tensors.parse`; the first axis has the layers with experts.
      beyond: field with the number of layers behind the last whose tensors are not read.
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
    state: dict[str, str] = dataclasses.field(default_factory=dict)
    beyond: str = ""


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


def _deepseek_knobs(config: Config) -> Knobs:
    return {knob: config[field] or least for field, (knob, least) in _DEEPSEEK.items()}


def _deepseek_fields(knobs: Knobs) -> dict[str, Any]:
    fields = {field: knobs[knob] for field, (knob, _) in _DEEPSEEK.items()}
    own = {"v_head_dim": knobs["value_dim"] or knobs["head_dim"], "q_lora_rank": knobs["query_latent_dim"] or None}
    own |= {"moe_intermediate_size": knobs["expert_dim"] or knobs["mlp_dim"], "head_dim": knobs["rope_dim"]}
    return fields | own | {"num_nextn_predict_layers": 0}


# Field -> knob, and its value for null.
_DEEPSEEK = {
    "q_lora_rank": ("query_latent_dim", 0),
    "kv_lora_rank": ("latent_dim", 0),
    "qk_nope_head_dim": ("head_dim", 0),
    "qk_rope_head_dim": ("rope_dim", 0),
    "v_head_dim": ("value_dim", 0),
    "n_routed_experts": ("experts", 0),
    "num_experts_per_tok": ("experts_per_token", 0),
    "moe_intermediate_size": ("expert_dim", 0),
    "n_shared_experts": ("shared_experts", 0),
    "first_k_dense_replace": ("dense_layers", 0),
    "routed_scaling_factor": ("router_scale", 0),
    "norm_topk_prob": ("router_normed", False),
    "n_group": ("router_groups", 1),
    "topk_group": ("groups_per_token", 1),
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
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        _EMBEDDINGS | _LATENTS | _MLP | _SHARED_EXPERTS | _PRE_NORMS,
        defaults={
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e4,
            "tie_word_embeddings": False,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "n_shared_experts": 1,
            "first_k_dense_replace": 3,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "n_group": 8,
            "topk_group": 4,
            "num_nextn_predict_layers": 1,
        },
        knobs={"router": "sigmoid", "router_bias": True},
        required={
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_interleave": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",  # groups and biases as in `moe.route`
            "moe_layer_freq": 1,
        },
        # Of training, devices and the program; qk_head_dim and head_dim follow from others.
        ignored=frozenset({"auto_map", "aux_loss_alpha", "ep_size", "num_mtp_layers", "qk_head_dim", "seq_aux"}),
        own=_deepseek_knobs,
        own_fields=_deepseek_fields,
        state={"routers/bias": "model.layers.{L}.mlp.gate.e_score_correction_bias: X"},
        beyond="num_nextn_predict_layers",
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
    if quantized := given.get("quantization_config"):
        raise ValueError(
            f"config.json: quantization_config={quantized}: weights must not be quantized. Convert them to bfloat16, "
            "and remove the field"
        )
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
    found |= family.knobs | rotations.from_config(given) | family.own(given)
    if found.get("experts") and found["experts_per_token"] == 1 and found.get("router_normed", True):
        raise ValueError(
            "config.json: num_experts_per_tok=1: an expert with a weight of 1 for every token is not expressed here"
        )
    return found


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
    offset = FAMILIES[model_type].norm_offset
    return {
        path: Tensors.parse(text, axes, offset if path.endswith("norm/scale") else 0.0, first)
        for path, (text, axes, first) in stacks(task, model_type).items()
    }


def stacks(task: Knobs, model_type: str) -> dict[str, tuple[str, dict[str, int], int]]:
    """Return the path of each parameter of a task -> its text in the table, sizes of axes, and its first layer."""
    axes, routed = sizes(task), _routed(task)
    absent = {
        "head": task["tied_head"],
        "/query/": task["query_latent_dim"] > 0,
        "/query_": task["latent_dim"] > 0 and not task["query_latent_dim"],
        "/shared/": not task["shared_experts"],
    }
    found = {}
    for path, text in FAMILIES[model_type].tensors.items():
        if any(each and name in path for name, each in absent.items()):
            continue
        if not path.startswith("layers/"):
            found[path] = text, axes, 0
            continue
        dense = task["layers"] - routed
        if dense and "/moe/" not in path:
            name = path.replace("layers", "dense_layers", 1) if routed else path
            found[name] = text, axes | {"L": dense}, 0
        if routed and "/mlp/" not in path:
            found[path] = text, axes | {"L": routed}, dense
    return found


def state(task: Knobs, model_type: str) -> dict[str, Tensors]:
    """Return the path of each array of the model state of a task -> its tensors in a folder of a family."""
    routed = _routed(task)
    texts = FAMILIES[model_type].state.items()
    return {path: Tensors.parse(x, sizes(task) | {"L": routed}, first=task["layers"] - routed) for path, x in texts}


def _routed(task: Knobs) -> int:
    """Return the number of layers with experts, the last ones."""
    return task["layers"] - task["dense_layers"] if task["experts"] else 0


def sizes(task: Mapping[str, Any]) -> dict[str, int]:
    """Return the size of each axis of the tables."""
    axes = {"V": "vocab_size", "E": "embed_dim", "H": "heads", "K": "kv_heads", "D": "head_dim", "L": "layers"}
    axes |= {"M": "mlp_dim", "X": "experts", "C": "latent_dim", "N": "query_latent_dim"}
    found = {axis: task[knob] for axis, knob in axes.items()}
    found["F"] = task["expert_dim"] or found["M"]  # hidden units of an expert
    found["S"] = task["shared_experts"] * found["F"]
    found["U"] = task["value_dim"] or found["D"]  # width of values
    found["Q"], found["W"] = found["D"] + task["rope_dim"], found["D"] + found["U"]
    return found | {"A": found["C"] + task["rope_dim"]}


def unused(name: str, config: Config) -> bool:
    """Return whether a folder may have a tensor that holds no parameter.

    These are a tied head, frequencies of rotations, and the layers behind the last that predict further tokens.
    """
    if name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq"):
        return True
    family, last = _family(config), config["num_hidden_layers"]
    count = (family.defaults | dict(config))[family.beyond] if family.beyond else 0
    return any(name.startswith(f"model.layers.{number}.") for number in range(last, last + count))


def differences(needed: Knobs, given: Knobs) -> dict[str, tuple[Any, Any]]:
    """Return knob -> (value needed, value given) of the knobs that differ and matter."""
    needed, given = _explicit(needed), _explicit(given)
    return {
        knob: (value, given[knob])
        for knob, value in needed.items()
        if knob not in FREE and not _equal(knob, value, given[knob])
    }


def _explicit(knobs: Knobs) -> Knobs:
    """Return knobs with the values of those that others determine by default."""
    own = {"router_bias": knobs["router_bias"] or knobs["balance_rate"] > 0} if knobs["experts"] else {}
    own |= {"expert_dim": knobs["expert_dim"] or knobs["mlp_dim"]} if knobs["experts"] else {}
    return knobs | own | ({"value_dim": knobs["value_dim"] or knobs["head_dim"]} if knobs["latent_dim"] else {})


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
