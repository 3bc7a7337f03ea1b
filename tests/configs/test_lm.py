import json

import jax
import numpy as np
import pytest

from shampax.configs import lm
from shampax.framework.config import load
from shampax.framework.train import train
from shampax.launch.train import main

SMALL = (
    "task.layers=2",
    "task.embed_dim=32",
    "task.heads=4",
    "task.kv_heads=2",
    "task.head_dim=8",
    "task.mlp_dim=48",
    "task.vocab_size=300",
    "data.source=sample:enwiki",
    "data.sequence_length=16",
    "data.max_documents=2",
    "schedule.warmup=1 steps",
    "batch_size=16",
    "evaluation.batches=1",
    "checkpoint.every=0 steps",
    "log.every=1 steps",
)
SHAMPOO = ("optimizer.block_size=32", "optimizer.interval=3")


def history(workdir, key):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


# Of the family one: the others differ in a word that tests/optimizers tries.
@pytest.mark.parametrize("variant", [name for name in lm.VARIANTS if name not in ("sample_kl_shampoo", "sample_muon")])
def test_every_variant_trains_through_the_command_line(variant, tmp_path, capsys):
    """Catches a shipped config that does not build, compile, train or report."""
    changes = SMALL if variant == "sample_adamw" else SMALL + SHAMPOO
    if variant == "sample_host":
        changes = (*SMALL, "optimizer.block_size=32")
    mesh = {"1b": "fsdp tensor", "8b": "fsdp tensor", "moe": "fsdp expert", "long": "fsdp sequence"}.get(variant, "")
    changes = (*changes, *(f"mesh.{axis}=2" for axis in mesh.split()))
    arguments = [f"--config=shampax/configs/lm.py:{variant}", f"--workdir={tmp_path / 'run'}"]
    changes = (*changes, "duration=4 steps", "evaluation.every=2 steps")
    assert main([*arguments, *(f"--config.{change}" for change in changes)]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 4
    assert result["devices"] == 8
    assert result["skipped_steps"] == 0
    assert np.isfinite(result["heldout_loss"])
    assert 0 < result["bits_per_character"] < 9
    assert (result["refreshes"] > 0) == (variant != "sample_adamw")
    assert len(history(tmp_path / "run", "train/loss")) == 4
    assert "launch.report" in capsys.readouterr().out


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lm") / "one"
    train(twenty_steps(), workdir, devices=jax.devices()[:1])
    return workdir


def twenty_steps():
    return config_of("sample", "duration=20 steps")


def config_of(variant, *changes):
    return load(f"shampax/configs/lm.py:{variant}", [*SMALL, *SHAMPOO, "evaluation.every=0 steps", *changes])


@pytest.mark.parametrize(("devices", "mesh"), [(2, {}), (4, {"fsdp": 2, "tensor": 2}), (8, {"fsdp": 2, "tensor": 2})])
def test_the_same_run_on_every_mesh(on_one_device, tmp_path, devices, mesh):
    """Catches a loss, an update or a refresh that depends on where things lie."""
    config = twenty_steps()
    config.mesh.update(mesh)
    train(config, tmp_path, devices=jax.devices()[:devices])
    losses = history(tmp_path, "train/loss")
    assert len(losses) == 20
    np.testing.assert_allclose(losses, history(on_one_device, "train/loss"), rtol=1e-4)


def test_experts_and_positions_over_devices_train_as_on_one(tmp_path):
    """Catches statistics of an expert that are given to another, or owners that overlook an axis of the mesh."""
    on = {"one": (1, {"expert": 1}), "four": (4, {"expert": 2, "sequence": 2})}
    for name, (devices, mesh) in on.items():
        config = config_of("sample_moe", "duration=5 steps", "task.attention_block=8")
        config.mesh.update(mesh)
        train(config, tmp_path / name, devices=jax.devices()[:devices])
    table = (tmp_path / "four" / "parameters.txt").read_text()
    gate = next(line.split() for line in table.splitlines() if line.startswith("layers/moe/gate"))
    assert gate[1:3] == ["2x4x32x48", "-,expert"] and gate[3].startswith("shampoo")
    for key in ("train/loss", "train/update_norm"):
        one, four = (history(tmp_path / name, key) for name in on)
        np.testing.assert_allclose(four, one, rtol=1e-3, err_msg=key)


def test_golden_steps(on_one_device):
    """Catches any unmeant change to initialisation, data, model, loss or optimizer."""
    golden = {
        "train/loss": [5.72604, 5.28076, 4.51951],
        "train/gradient_norm": [0.99700, 1.81901, 0.88565],
        "train/update_norm": [1.23361, 1.93399, 1.72495],
    }
    for key, values in golden.items():
        np.testing.assert_allclose(history(on_one_device, key)[:5:2], values, rtol=2e-3, err_msg=key)
