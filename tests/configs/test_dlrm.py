import json

import jax
import numpy as np
import pytest
from shrunk import DLRM as TINY
from shrunk import DLRM_ROWS as ROWS
from sklearn.metrics import roc_auc_score
from synthetic_clicks import SyntheticClicks
from workdirs import cut_short, history

from shampax.configs import base, dlrm
from shampax.framework.config.check import load
from shampax.framework.train import train
from shampax.launch.train import main

SHAMPOO = ("optimizer.block_size=4",)


@pytest.fixture(scope="module")
def criteo(tmp_path_factory):
    """Return the function that writes two files in Criteo's format, with several values of a category or one, and
    returns the overrides that read them."""

    def write(several):
        random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("criteo")
        for day in (0, 1):
            with (folder / f"day_{day}").open("w") as file:
                for _ in range(60):
                    integers = [str(x) if x >= -2 else "" for x in random.integers(-5, 500, 13)]
                    categories = [f"{x:08x}" if x % 9 else "" for x in random.integers(0, 2**32, 26)]
                    if several:
                        categories = [f"{text},{number}" if text else "" for number, text in enumerate(categories)]
                    file.write("\t".join([str(random.integers(2)), *integers, *categories]) + "\n")
        return f"data.source=file:{folder}/day_*", "data.heldout_files=day_1"

    return write


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=() if name == "sample_adagrad" else pytest.mark.slow) for name in dlrm.VARIANTS],
)
def test_every_variant_trains_through_the_command_line(variant, criteo, tmp_path, capsys):
    """Fault: a shipped config does not build, compile, train, report, or read Criteo's files."""
    changes = [*TINY, ROWS, "duration=3 steps", *(() if variant == "sample_adagrad" else SHAMPOO)]
    if not variant.startswith("sample"):
        changes += [*criteo(variant == "paper"), "data.workers=1"]  # the terabyte config starts 24 processes
    if variant == "paper":
        several = f"task.rows={(4, *(20,) * 25)}", "task.width_power=0.5", "data.most_values=2", "task.pooling=mean"
        changes += several
    arguments = [f"--config=shampax/configs/dlrm.py:{variant}", f"--workdir={tmp_path / 'run'}"]
    assert main([*arguments, *(f"--config.{change}" for change in changes)]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["steps"], result["devices"], result["skipped_steps"]) == (3, 8, 0)
    assert 0 < result["auc"] < 1 and 0.1 < result["calibration"] < 10
    assert result["log_loss"] == pytest.approx(result["heldout_loss"], rel=1e-5)
    assert len(history(tmp_path / "run", "train/loss")) == 3
    table = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("embedding"))
    assert "rows (adagrad)" in table and ("data" in table)


def sample():
    changes = (*TINY, *SHAMPOO, ROWS, "duration=6 steps", "schedule.decay=constant")
    sparse = "task.sparse_updates=True", "optimizer.weight_decay=0.0"
    config = load("shampax/configs/dlrm.py:sample", (*changes, *sparse))
    config.mesh.update({"fsdp": 2, "tensor": 2})
    return config


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    """Train the shrunk sample for six steps on four devices with all tables split between them."""
    workdir = tmp_path_factory.mktemp("dlrm") / "four"
    return workdir, train(sample(), workdir, devices=jax.devices()[:4])


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bitwise(on_four, tmp_path):
    """Fault: a checkpoint lacks row sums, integer statistics or the order of examples."""
    workdir, whole = on_four
    assert (whole["steps"], whole["devices"], whole["skipped_steps"]) == (6, 4, 0) and whole["refreshes"] > 0
    config = sample()
    config.resume_from = str(cut_short(workdir, tmp_path / "first", 3))
    resumed = train(config, tmp_path / "second", devices=jax.devices()[:4])
    assert history(tmp_path / "second", "train/loss") == history(workdir, "train/loss")[3:]
    for name in ("heldout_loss", "auc", "log_loss", "calibration"):
        assert resumed[name] == whole[name]


@pytest.mark.slow
def test_another_mesh_gives_the_same_run(on_four, tmp_path):
    """Fault: the sharding of tables changes the run."""
    config = sample()
    config.mesh.update({"fsdp": 1, "tensor": 1})
    train(config, tmp_path, devices=jax.devices()[:1])
    np.testing.assert_allclose(history(on_four[0], "train/loss"), history(tmp_path, "train/loss"), rtol=1e-4)


@pytest.mark.slow
def test_the_model_learns_the_teacher_of_synthetic_data(tmp_path):
    """Faults: evaluation uses other rows for a category than training; the loss has the wrong sign; tables do not
    learn."""
    config = base.get_config()
    task = {"rows": (64,) * 26, "embed_dim": 4, "bottom": (16, 4), "top": (16,), "normalize_integers": True}
    config.task = base.component("shampax.models.dlrm:DLRMTask", **task)
    clicks = {"values": 8, "signal": 2.0, "examples_in_train": 60_000, "examples_in_heldout": 4_000}
    config.data = base.component("synthetic_clicks:SyntheticClicks", **clicks)
    config.optimizer = base.component(base.ADAMW, rate_rules=(("embedding", 3.0), (".*", 1.0)))
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
