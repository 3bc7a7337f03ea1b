import functools
import math

import flax.linen as nn
import jax
import numpy as np
import pytest
from shrunk import LM

from shampax.configs import families
from shampax.framework.config import components
from shampax.framework.config.check import load
from shampax.framework.train import train

# Published numbers of parameters: model cards, or safetensors' indices; of Gemma 3 4B the text model's.
PUBLISHED = {
    "llama3_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen3_8b": 8_190_735_360,
    "gemma3_4b": 3_880_263_168,
    "olmo2_7b": 7_298_617_344,
    "mixtral_8x7b": 46_702_792_704,
    "deepseek_v3": 671_026_419_200,  # without the module that predicts a further token
}


@functools.cache
def shapes(variant):
    task = components.build(families.get_config(variant).task)
    return task, jax.eval_shape(lambda: nn.unbox(task.boxed(jax.random.key(0))))


@pytest.mark.parametrize("variant", [name for name in families.VARIANTS if not name.endswith("_small")])
def test_parameters_are_as_many_as_published(variant):
    """Fault: a size or an option differs from the model that the config is named after."""
    task, variables = shapes(variant)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    if task.router_bias:
        count += math.prod(variables["routers"]["bias"].shape)
    assert count == PUBLISHED[variant]


def test_small_twins_have_the_options_of_the_large_models():
    """Fault: a twin trains another architecture than the model that it stands for."""
    for full, small in (("llama3_8b", "llama3"), ("gemma3_4b", "gemma3"), ("deepseek_v3", "deepseek_v3")):
        (_, large), (_, twin) = shapes(full), shapes(f"{small}_small")
        assert jax.tree.structure(large) == jax.tree.structure(twin)
        assert sum(leaf.size for leaf in jax.tree.leaves(twin)) < 700_000


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in families.VARIANTS if name.endswith("_small")])
def test_small_twins_train(variant, tmp_path):
    """Faults: an option does not compile on a mesh, or breaks the optimizer's plan; a step gives NaN."""
    changes = [*LM, "optimizer.block_size=16", "optimizer.interval=3", "duration=4 steps", "evaluation.every=4 steps"]
    routed = variant in ("mixtral_small", "deepseek_v3_small")
    changes += ["mesh.expert=2", "task.expert_dim=32"] if routed else ["mesh.fsdp=2"]
    if variant == "deepseek_v3_small":
        changes += ["task.kv_heads=4", *(f"task.{name}=16" for name in ("latent_dim", "query_latent_dim", "rope_dim"))]
    if variant == "gemma3_small":
        changes += ["task.layer_pattern=('local', 'global')", "task.attention_window=4"]
    config = load(f"shampax/configs/families.py:{variant}", changes)
    result = train(config, tmp_path, devices=jax.devices()[:2])
    assert (result["steps"], result["devices"], result["skipped_steps"]) == (4, 2, 0)
    assert np.isfinite(result["heldout_loss"]) and result["refreshes"] > 0
