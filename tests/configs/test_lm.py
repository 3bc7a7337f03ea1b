import contextlib
import functools
import io
import json

import jax
import numpy as np
import pytest
from shrunk import LM as SMALL
from workdirs import cut_short, history

from shampax.configs import lm
from shampax.framework.config.check import load
from shampax.framework.train import train
from shampax.launch.train import main

SHAMPOO = ("optimizer.block_size=16", "optimizer.interval=3")
TWELVE_STEPS = "duration=12 steps"
BY_TWO = {
    "sample": "fsdp tensor",
    "1b": "fsdp tensor",
    "8b": "fsdp tensor",
    "moe": "fsdp expert",
    "long": "fsdp sequence",
}


@pytest.fixture(scope="module")
def commanded(tmp_path_factory):
    """Train a variant by the command, once, on eight devices: variant -> (workdir, output)."""

    @functools.cache
    def run(variant):
        workdir = tmp_path_factory.mktemp("lm") / variant
        changes = [*SMALL, *(f"mesh.{axis}=2" for axis in BY_TWO.get(variant, "").split())]
        changes += {"sample_adamw": (), "sample_host": SHAMPOO[:1]}.get(variant, SHAMPOO)
        changes += ("data.max_records=60", "data.shard_size=8", "data.shuffle_window=2") if variant == "1b" else ()
        changes += ["slices=2"] if variant == "8b" else []
        changes += [TWELVE_STEPS if variant == "sample" else "duration=4 steps", "evaluation.every=2 steps"]
        arguments = [f"--config=shampax/configs/lm.py:{variant}", f"--workdir={workdir}"]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main([*arguments, *(f"--config.{change}" for change in changes)]) == 0
        return workdir, out.getvalue()

    return run


@pytest.mark.parametrize(
    "variant",
    # `mixture` trains sample_moe.
    [pytest.param(v, marks=() if v == "sample" else pytest.mark.slow) for v in lm.VARIANTS if v != "sample_moe"],
)
def test_every_variant_trains_through_the_command_line(variant, commanded):
    """Faults: a shipped config does not build, compile, train or report; a large one waits until all its data are
    prepared; the model does not compile for two slices."""
    workdir, out = commanded(variant)
    result = json.loads((workdir / "result.json").read_text())
    steps = 12 if variant == "sample" else 4
    assert result["steps"] == steps
    assert result["devices"] == 8
    assert result["skipped_steps"] == 0
    assert np.isfinite(result["heldout_loss"])
    assert 0 < result["bits_per_byte"] < 9
    assert bool(list(workdir.glob("data/rows-*/started.json"))) == (variant in ("1b", "8b", "moe", "long"))
    assert (result["refreshes"] > 0) == (variant not in ("sample_adamw", "sample_muon"))
    assert len(history(workdir, "train/loss")) == steps
    assert "-m shampax report" in out


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lm") / "one"
    train(config_of("sample", TWELVE_STEPS), workdir, devices=jax.devices()[:1])
    return workdir


def config_of(variant, *changes):
    return load(f"shampax/configs/lm.py:{variant}", [*SMALL, *SHAMPOO, "evaluation.every=0 steps", *changes])


def test_a_mesh_of_three_axes_gives_the_same_run(on_one_device, commanded):
    """Fault: a loss, an update or a refresh depends on the sharding."""
    losses = history(commanded("sample")[0], "train/loss")
    assert len(losses) == 12
    np.testing.assert_allclose(losses, history(on_one_device, "train/loss"), rtol=1e-4)


def train_mixture(workdir, devices, **mesh):
    """Train the sample with experts for four steps, with a checkpoint every second step."""
    changes = ("duration=4 steps", "task.balance_rate=0.1", "task.attention_block=8", "microbatches=2")
    config = config_of("sample_moe", *changes, "checkpoint.every=2 steps")
    config.mesh.update(mesh)
    return train(config, workdir, devices=jax.devices()[:devices])


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Train with experts and positions split between four devices; return the workdir."""
    workdir = tmp_path_factory.mktemp("mixture") / "four"
    result = train_mixture(workdir, 4, expert=2, sequence=2)
    assert (result["steps"], result["skipped_steps"]) == (4, 0) and result["refreshes"] > 0
    return workdir


@pytest.mark.slow
def test_sharded_experts_and_positions_train_as_on_one_device(mixture, tmp_path):
    """Faults: an expert gets the statistics of another; owners ignore an axis of the mesh."""
    train_mixture(tmp_path, 1, expert=1)
    table = (mixture / "parameters.txt").read_text()
    gate = next(line.split() for line in table.splitlines() if line.startswith("layers/moe/gate"))
    assert gate[1:3] == ["2x4x16x32", "-,expert"] and gate[3].startswith("shampoo")
    for key in ("train/loss", "train/update_norm"):
        np.testing.assert_allclose(history(mixture, key), history(tmp_path, key), rtol=1e-3, err_msg=key)


@pytest.mark.slow
def test_a_resumed_mixture_continues_bit_for_bit(mixture, tmp_path):
    """Fault: the biases of routers are not saved, or begin at 0 again."""
    resumed = cut_short(mixture, tmp_path / "resumed", 2)
    train_mixture(resumed, 4, expert=2, sequence=2)
    whole, resumed = (history(workdir, "train/loss") for workdir in (mixture, resumed))
    assert len(whole) == 4
    np.testing.assert_array_equal(resumed, whole)


def test_golden_steps(on_one_device):
    """Fault: an unintended change of initialisation, data, model, loss or optimizer."""
    golden = {
        "train/loss": [5.70703, 5.47379, 4.60275],
        "train/gradient_norm": [0.63524, 1.30623, 0.93364],
        "train/update_norm": [1.72878, 2.73509, 1.95985],
    }
    for key, values in golden.items():
        np.testing.assert_allclose(history(on_one_device, key)[:5:2], values, rtol=2e-3, err_msg=key)
