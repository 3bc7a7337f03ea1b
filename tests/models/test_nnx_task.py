import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from mlp_tasks import INPUTS, NNXNetTask, batch_of, linen_loss
from traced import quick_jit
from workdirs import cut_short, history

from shampax.configs import base
from shampax.framework.train import train
from shampax.models.nnx_task import NNXTask

TASK = NNXNetTask()


@functools.cache
def initial_variables():
    return quick_jit(TASK.init)(jax.random.key(1), {})


def make_config():
    config = base.get_config()
    config.task = base.component("mlp_tasks:NNXNetTask")
    config.data = base.component("mlp_tasks:PointsData")
    config.optimizer = base.component("shampax.optimizers.baselines:AdamWOptions")
    config.duration = "12 steps"
    config.batch_size = 16
    config.evaluation.every = "0 steps"
    config.checkpoint.every = "6 steps"
    config.log.every = "1 steps"
    config.schedule.learning_rate = 0.05
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("nnx") / "whole"
    return workdir, train(make_config(), workdir, devices=jax.devices()[:2])


def test_a_module_trains_and_resumes_bitwise(trained, tmp_path, capsys):
    """Faults: dropout depends on the number of draws since the start of the process; a checkpoint lacks statistics."""
    whole, result = trained
    assert history(whole, "train/loss")[-1] < history(whole, "train/loss")[0]
    assert 0 < result["accuracy"] <= 1
    assert result["parameters"] == INPUTS * 8 + 8 + 8 * 8 + 8 + 2 * 8 + 8 * 4 + 4
    resumed = cut_short(whole, tmp_path / "resumed", 6)
    again = train(make_config(), resumed, devices=jax.devices()[:2])
    assert f"resuming from {resumed / 'checkpoints' / '6'}" in capsys.readouterr().out
    assert history(resumed, "train/loss") == history(whole, "train/loss")
    assert again["heldout_loss"] == result["heldout_loss"]


@pytest.mark.slow
def test_another_mesh_gives_the_same_run(trained, tmp_path):
    """Faults: statistics are of a device's own examples; no rule has the logical names of parameters."""
    config = make_config()
    config.mesh.fsdp, config.mesh.tensor = 2, 2
    train(config, tmp_path / "four", devices=jax.devices()[:4])
    table = (tmp_path / "four" / "parameters.txt").read_text()
    assert [line.split()[2] for line in table.splitlines() if line.startswith("hidden/1/kernel")] == ["fsdp,tensor"]
    np.testing.assert_allclose(history(tmp_path / "four", "train/loss"), history(trained[0], "train/loss"), rtol=1e-4)


def as_linen(variables):
    """Return the same arrays under the names of Linen modules."""
    params = dict(variables["params"])
    layers = params.pop("hidden")
    return {
        "params": params | {f"hidden_{number}": layer for number, layer in layers.items()},
        "batch_stats": variables["state"],
    }


@pytest.mark.parametrize("train", [True, False])
def test_numbers_equal_the_same_linen_module(train):
    """Faults: the wrong mode; statistics are not updated; a gradient is of a stale copy."""
    task, batch = dataclasses.replace(TASK, dropout=0.0), batch_of()
    variables = jax.tree.map(lambda x: x, initial_variables())
    variables["state"]["norm"]["mean"] += 0.3

    def loss(params):
        return task.loss(variables | {"params": params}, batch, key=jax.random.key(2), train=train)

    def same_in_linen(params):
        return linen_loss(8, as_linen(variables | {"params": params}), batch, train)

    @quick_jit
    def both(params):
        return [jax.value_and_grad(each, has_aux=True)(params) for each in (loss, same_in_linen)]

    found, wanted = both(variables["params"])
    (value, (state, metrics)), gradient = found
    (expected, (linen_state, linen_metrics)), linen_gradient = wanted
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    found = {"params": gradient, "state": state["state"], "metrics": metrics}
    wanted = {"params": linen_gradient, "state": linen_state["batch_stats"], "metrics": linen_metrics}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), found, wanted)


def test_dropout_is_a_function_of_the_key():
    """Fault: the same units are dropped at every step, in every layer, or in evaluation."""
    batch, variables = batch_of(), initial_variables()

    @functools.partial(quick_jit, static_argnums=1)
    def loss(seed, train=True):
        return TASK.loss(variables, batch, key=jax.random.key(seed), train=train)[0]

    assert loss(1) == loss(1) != loss(2)
    assert loss(1, False) == loss(2, False)


class Stacked(nnx.Module):
    """Layers made by vmap. Their random streams are stacks of keys."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def layers(rngs):
            return nnx.Dropout(0.5, rngs=rngs)

        self.layers = layers(rngs)
        self.scale = nnx.Param(jax.numpy.ones(()))

    def __call__(self, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.layers, x)


class StackedTask(NNXTask):
    def module(self, rngs):
        return Stacked(rngs)

    def measure(self, module, batch, *, train):
        return {"kept": (module(batch["ones"]), module.scale.get_value())}

    def flops(self, batch_spec):
        return 0.0


def test_stacked_layers_drop_different_units():
    """Fault: all stacked layers share one key."""
    variables = StackedTask().init(jax.random.key(0), {})
    module = StackedTask().assemble(variables, key=jax.random.key(5), train=True)
    kept = np.asarray(module(np.ones(64, np.float32)))
    assert kept.shape == (3, 64)
    assert len({tuple(layer) for layer in kept}) == 3


def test_variables_are_plain_dicts_of_arrays_without_random_state():
    """Faults: keys of random streams are saved; boxes or integer names are in the tree."""
    variables = jax.eval_shape(lambda: TASK.init(jax.random.key(0), {}))
    axes = TASK.logical_axes(variables)
    assert set(variables) == {"params", "state"}
    assert set(variables["params"]) == {"hidden", "norm", "out"}
    assert set(variables["params"]["hidden"]) == {"0", "1"}
    assert axes["params"]["hidden"]["1"] == {"kernel": ("embed", "mlp"), "bias": (None,)}
    assert axes["state"] == {"norm": {"mean": (None,), "var": (None,)}}
    jax.tree.map(lambda x: x.shape, variables)


def test_a_module_without_a_loss_is_refused():
    """Fault: a KeyError inside a trace."""
    variables = StackedTask().init(jax.random.key(0), {})
    with pytest.raises(ValueError, match=r"StackedTask\.measure returns kept and no 'loss'"):
        StackedTask().loss(variables, {"ones": np.ones(4)}, key=jax.random.key(0), train=True)
