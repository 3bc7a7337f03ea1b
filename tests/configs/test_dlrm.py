import json

import jax
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from shampax.configs import base, dlrm
from shampax.framework.config import load
from shampax.framework.data.synthetic_clicks import SyntheticClicks
from shampax.framework.train import train
from shampax.launch.train import main

TINY = (
    "task.embed_dim=4",
    "task.bottom=(8, 4)",
    "task.top=(8,)",
    "schedule.warmup=1 steps",
    "batch_size=16",
    "evaluation.batches=2",
    "checkpoint.every=0 steps",
    "log.every=1 steps",
)
ROWS = f"task.rows={(20,) * 26}"


def history(workdir, key):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module")
def criteo(tmp_path_factory):
    """Two files in Criteo's form, and what makes a config read them."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("criteo")
    for day in (0, 1):
        with (folder / f"day_{day}").open("w") as file:
            for _ in range(60):
                integers = [str(x) if x >= -2 else "" for x in random.integers(-5, 500, 13)]
                categories = [f"{x:08x}" if x % 9 else "" for x in random.integers(0, 2**32, 26)]
                file.write("\t".join([str(random.integers(2)), *integers, *categories]) + "\n")
    return f"data.source=file:{folder}/day_*", "data.heldout_files=day_1"


@pytest.mark.parametrize("variant", dlrm.VARIANTS)
def test_every_variant_trains_through_the_command_line(variant, criteo, tmp_path, capsys):
    """Fault: a shipped config that does not build, compile, train or report; Criteo's files that it cannot read."""
    changes = [*TINY, ROWS, "duration=3 steps"]
    if not variant.startswith("sample"):
        changes += criteo
    arguments = [f"--config=shampax/configs/dlrm.py:{variant}", f"--workdir={tmp_path / 'run'}"]
    assert main([*arguments, *(f"--config.{change}" for change in changes)]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["steps"], result["devices"], result["skipped_steps"]) == (3, 8, 0)
    assert 0 < result["auc"] < 1 and 0.1 < result["calibration"] < 10
    assert result["log_loss"] == pytest.approx(result["heldout_loss"], rel=1e-5)
    assert len(history(tmp_path / "run", "train/loss")) == 3
    table = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("embedding"))
    assert "rows (adagrad)" in table and ("data" in table)


def sample(duration):
    config = load("shampax/configs/dlrm.py:sample", [*TINY, ROWS, f"duration={duration}", "schedule.decay=constant"])
    config.mesh.update({"fsdp": 2, "tensor": 2})
    return config


def test_a_resumed_run_is_the_same_bitwise(tmp_path):
    """Fault: sums of rows, statistics of integers or the order of clicks that a checkpoint does not hold."""
    devices = jax.devices()[:4]
    whole = train(sample("6 steps"), tmp_path / "whole", devices=devices)
    train(sample("3 steps"), tmp_path / "first", devices=devices)
    again = sample("6 steps")
    again.resume_from = str(tmp_path / "first")
    resumed = train(again, tmp_path / "second", devices=devices)
    assert history(tmp_path / "second", "train/loss") == history(tmp_path / "whole", "train/loss")[3:]
    for name in ("heldout_loss", "auc", "log_loss", "calibration"):
        assert resumed[name] == whole[name]


def test_the_same_on_another_mesh(tmp_path):
    """Fault: tables that are divided otherwise give another run."""
    train(sample("4 steps"), tmp_path / "four", devices=jax.devices()[:4])
    config = sample("4 steps")
    config.mesh.update({"fsdp": 1, "tensor": 1})
    train(config, tmp_path / "one", devices=jax.devices()[:1])
    four, one = (history(tmp_path / run, "train/loss") for run in ("four", "one"))
    np.testing.assert_allclose(four, one, rtol=1e-4)


def test_a_teacher_is_found_again(tmp_path):
    """Fault: categories that meet other rows than in training, a loss of the wrong sign, tables that do not learn."""
    config = base.get_config()
    task = {"rows": (64,) * 26, "embed_dim": 4, "bottom": (16, 4), "top": (16,), "normalize_integers": True}
    config.task = base.component("shampax.models.dlrm:DLRMTask", **task)
    clicks = {"values": 8, "signal": 2.0, "examples_in_train": 60_000, "examples_in_heldout": 4_000}
    config.data = base.component("shampax.framework.data.synthetic_clicks:SyntheticClicks", **clicks)
    config.optimizer = base.component(
        dlrm.SHAMPOO, treatments=dlrm.TREATMENTS, rate_rules=(("embedding", 3.0), (".*", 1.0))
    )
    config.sharding_rules = dlrm.SHARDING_RULES
    config.batch_size, config.duration = 512, "150 steps"
    config.schedule.learning_rate = 2e-2
    config.evaluation.every = config.checkpoint.every = "0 steps"
    result = train(config, tmp_path, devices=jax.devices()[:1])
    teacher = SyntheticClicks(**clicks).examples("heldout", tmp_path)
    taught = [teacher.taught(i) for i in range(len(teacher))]
    best = roc_auc_score([int(example["label"]) for example, _ in taught], [chance for _, chance in taught])
    assert result["auc"] > 0.5 + 0.9 * (best - 0.5)
    assert 0.9 < result["calibration"] < 1.1
