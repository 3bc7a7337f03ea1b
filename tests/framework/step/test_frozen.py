"""Runs in which parameters are frozen: the base of adapters of a network with batch statistics."""

import jax
import numpy as np
import pytest
from workdirs import cut_short

from shampax.configs import base
from shampax.framework.base.errors import UserError
from shampax.framework.checkpoint import store
from shampax.framework.train import train

STEPS = 6


def config_of(rank, **changes):
    config = base.get_config()
    config.task = base.component("mlp_tasks:LinenNetTask", rank=rank)
    config.data = base.component("mlp_tasks:PointsData")
    config.optimizer = base.component(base.SHAMPOO, block_size=8)
    config.duration, config.batch_size = f"{STEPS} steps", 16
    config.evaluation.every, config.checkpoint.every, config.log.every = "0 steps", f"{STEPS // 2} steps", "1 steps"
    config.schedule.learning_rate = 0.05
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Return the workdir of the base."""
    workdir = tmp_path_factory.mktemp("frozen") / "base"
    config = config_of(0, duration="2 steps")
    config.optimizer = base.component(base.ADAMW)
    train(config, workdir, devices=jax.devices()[:1])
    return workdir


def arrays(workdir, step=STEPS):
    path = workdir / "checkpoints" / str(step)
    return store.read(path, dict.fromkeys(store.arrays(path)))


def test_a_run_with_adapters(pretrained, tmp_path, capsys):
    """Faults: the base changes, by the step, the guard or the average; the optimizer has a state for it; the average
    keeps a second copy of it; a resumed run takes it from another place."""
    changes = {"init_from": str(pretrained), "ema_decay": 0.5, "microbatches": 2, "mesh.fsdp": 2, "mesh.data": 2}
    whole, devices = tmp_path / "whole", jax.devices()[:4]
    train(config_of(2, **changes), whole, devices=devices)
    assert "0 of 4 parameters, and 8 frozen ones" in capsys.readouterr().out
    before, after = arrays(pretrained, 2), arrays(whole)
    assert np.abs(after["params/hidden_0/lora_b"]).max() > 0.01
    frozen = {name.removeprefix("frozen/"): x for name, x in after.items() if name.startswith("frozen/")}
    assert frozen.keys() == {name.removeprefix("params/") for name in before if name.startswith("params/")}
    for name, value in frozen.items():
        np.testing.assert_array_equal(value, before[f"params/{name}"])
        assert not any(other.endswith(name) for other in after if not other.startswith("frozen/"))
    resumed = cut_short(whole, tmp_path / "resumed", STEPS // 2)
    train(config_of(2, **changes), resumed, devices=devices)
    again = arrays(resumed)
    assert again.keys() == after.keys()
    for name, value in after.items():
        np.testing.assert_array_equal(again[name], value)


def test_a_random_base_is_refused(tmp_path):
    """Fault: adapters are trained on a base of random numbers."""
    with pytest.raises(UserError, match="8 frozen parameters, such as hidden_0/bias, would keep random initial values"):
        train(config_of(2), tmp_path / "w", devices=jax.devices()[:1])
