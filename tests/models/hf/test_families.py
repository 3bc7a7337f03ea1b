import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util

from shampax.configs import families as presets
from shampax.framework.config import components
from shampax.models.hf import families
from shampax.models.hf.tensors import Tensors
from shampax.models.lm import LMTask

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def test_config_of_a_published_model():
    """Faults: a field sets another knob; a size that is left out is computed wrongly."""
    assert LMTask(**families.knobs(LLAMA)) == LMTask(
        vocab_size=128256,
        layers=16,
        embed_dim=2048,
        heads=32,
        kv_heads=8,
        head_dim=64,
        mlp_dim=8192,
        norm_epsilon=1e-5,
        rope_theta=500000.0,
        rope_scaling="llama3 factor=32 low=1 high=4 original=8192",
        tied_head=True,
    )


def test_both_spellings_of_rotary_positions():
    """Fault: a config of transformers 5 is read without its scaling."""
    fields = dict(LLAMA)
    fields["rope_parameters"] = fields.pop("rope_scaling") | {"rope_theta": fields.pop("rope_theta")}
    assert families.knobs(fields) == families.knobs(LLAMA)


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_a_config_that_is_written_is_read_again(model_type):
    """Fault: the two directions of a table differ."""
    sizes = dict.fromkeys(families._SIZES, 8) | {"num_attention_heads": 2}
    knobs = families.knobs({"model_type": model_type, **sizes})
    task = dataclasses.asdict(LMTask(**knobs))
    assert families.knobs(families.config(task, model_type)) == knobs
    written = LMTask(**knobs).folder_config(model_type)
    assert written["model_type"] == model_type


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "mamba"}, "model_type='mamba'"),
        ({"hidden_size": None}, "hidden_size=None: must be a whole number"),
        ({"attention_bias": True}, "attention_bias=True: can only be False"),
        ({"attn_sinks": 4}, "attn_sinks=4: is not known here"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weights must not be quantized"),
        (
            {"model_type": "deepseek_v3", "num_experts_per_tok": 1},
            "num_experts_per_tok=1: an expert with a weight of 1",
        ),
        ({"model_type": "deepseek_v3", "rope_interleave": False}, "rope_interleave=False: can only be True"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}}, "mscale"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(changes, told):
    """Fault: a field that changes the logits is ignored."""
    with pytest.raises(ValueError, match=told):
        families.knobs(LLAMA | changes)


def test_a_published_config_of_deepseek_v3():
    """Faults: the preset is another model than the published folder; a trained one has no family."""
    fields = {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "rope_theta": 10000,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
    }
    task = components.build(presets.get_config("deepseek_v3").task)
    abstract = traverse_util.flatten_dict(jax.eval_shape(lambda: nn.unbox(task.boxed(jax.random.key(0)))), sep="/")
    kept = {path.removeprefix("params/"): x.shape for path, x in abstract.items() if not path.endswith("/load")}
    tensors = task.folder_tensors(fields) | task.folder_state(fields)
    assert {path: each.parameter for path, each in tensors.items()} == kept
    written = task.folder_config()
    assert written["model_type"] == "deepseek_v3" and written["topk_method"] == "noaux_tc"


def test_layers_with_experts_begin_behind_the_dense_ones():
    """Faults: the stack of layers with experts has tensors of the first layers; so have its routers' biases."""
    sizes = dict.fromkeys(families._SIZES, 8) | {"num_attention_heads": 2, "num_hidden_layers": 5}
    fields = {"model_type": "deepseek_v3", **sizes, "first_k_dense_replace": 2}
    task = LMTask(**families.knobs(fields))
    names = {path: next(x.names())[1] for path, x in (task.folder_tensors(fields) | task.folder_state(fields)).items()}
    assert names["layers/moe/router"] == "model.layers.2.mlp.gate.weight"
    assert names["routers/bias"] == "model.layers.2.mlp.gate.e_score_correction_bias"
    assert names["layers/attention/out/kernel"] == "model.layers.2.self_attn.o_proj.weight"
    assert names["dense_layers/attention/out/kernel"] == "model.layers.0.self_attn.o_proj.weight"
    assert "layers/mlp/up/kernel" not in names and "dense_layers/moe/router" not in names


def test_a_task_without_a_family_is_refused_with_the_knob():
    """Fault: the export writes a config of another model."""
    with pytest.raises(ValueError, match=r"nearest would be mixtral: task\.router='softmax' \(now 'sigmoid'\)"):
        LMTask(experts=2, router="sigmoid").folder_config()
    with pytest.raises(ValueError, match=r"task\.rope_theta=500000\.0 \(now 10000\.0\)"):
        LMTask(**families.knobs(LLAMA) | {"rope_theta": 1e4}).folder_tensors(LLAMA)


def test_tensors_as_parameters():
    """Faults: heads and their dimensions are swapped; the wrong axis is stacked."""
    sizes = {"L": 2, "X": 3, "H": 2, "D": 3, "E": 4}
    tensors = Tensors.parse("l.{L}.x.{X}.q: H*D E -> E H D", sizes)
    assert tensors.parameter == (2, 3, 4, 2, 3)
    assert [*tensors.names()][4] == ((1, 1), "l.1.x.1.q")
    values = np.arange(24).reshape(6, 4)
    view = tensors.view(values)
    assert view[1, 0, 2] == values[2, 1] and view[3, 1, 0] == values[3, 3]
    assert view.base is values.base
