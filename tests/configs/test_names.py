import importlib

import flax.linen as nn
import jax
import pytest

from shampax.framework import optimizer
from shampax.framework.config import components
from shampax.optimizers import distributed_shampoo
from shampax.optimizers.plan import patterns

STACKS = ("layers", "encoder", "decoder", "stage2_rest")


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("lm", "8b"),
        ("lm", "moe"),
        ("families", "gemma3_4b"),
        ("families", "olmo2_7b"),
        ("bert", "base"),
        ("translation", "base"),
        ("resnet", "resnet50"),
        ("vit", "s16"),
    ],
)
def test_vectors_of_stacked_layers_are_diagonal(name, variant):
    """Fault: a scanned norm without names of its axes is preconditioned as a matrix of layers x channels."""
    task = components.build(importlib.import_module(f"shampax.configs.{name}").get_config(variant).task)
    variables = nn.unbox(jax.eval_shape(lambda: task.boxed(jax.random.key(0))))
    params, names = variables["params"], task.logical_axes(variables)["params"]
    treated = optimizer.treatments(distributed_shampoo(1e-3, axis_names=names), params)
    of_path = dict(zip(patterns.paths(params), jax.tree.leaves(params), strict=True))
    axes = dict(zip(of_path, jax.tree.structure(params).flatten_up_to(names), strict=True))
    stacked = [path for path in of_path if path.partition("/")[0] in STACKS]
    assert all(axes[path][0] == "layers" for path in stacked)
    vectors = [path for path in stacked if of_path[path].ndim == 2 or path.endswith("/scale")]
    assert vectors
    assert all(treated[path].startswith("diagonal") for path in vectors), {path: treated[path] for path in vectors}
