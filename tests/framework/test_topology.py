"""Test runs that resume on other meshes."""

import pathlib
import sys

import jax
import pytest
from processes import Job
from toy_runs import SHAMPOO, lines, make_config
from workdirs import cut_short

from shampax.configs import base
from shampax.framework.loop import Run
from shampax.framework.train import train

STEPS = 26
pytestmark = pytest.mark.slow


def config(**mesh):
    optimizer = base.component(SHAMPOO, block_size=8, interval=4, refresh="host", ridge=1e-4)
    return make_config(
        optimizer=optimizer,
        **{"duration": f"{STEPS} steps", "log.every": "1 steps", "evaluation.every": "13 steps"} | mesh,
    )


def test_resumes_on_eight_then_four_then_two_then_one_device(tmp_path, monkeypatch):
    """Faults: statistics, roots (also in flight) or momenta are assigned to another block; batches are in another
    order."""
    train(config(**{"mesh.fsdp": 2, "mesh.tensor": 2}), tmp_path / "whole", devices=jax.devices())
    moving = [
        (6, 8, {"mesh.fsdp": 2, "mesh.tensor": 2}),
        (11, 4, {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2}),
        (17, 2, {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 2}),
        (STEPS, 1, {}),
    ]
    for stop, devices, mesh in moving:
        monkeypatch.setattr(Run, "signal", lambda self, stop=stop: "SIGTERM" if self.step == stop else None)
        result = train(config(**mesh), tmp_path / "moved", devices=jax.devices()[:devices])
        assert (result["steps"], result["devices"]) == (stop, devices)
    monkeypatch.undo()
    whole, moved = (
        {line["step"]: line["train/loss"] for line in lines(tmp_path / name) if "train/loss" in line}
        for name in ("whole", "moved")
    )
    assert len(whole) == STEPS
    assert moved == pytest.approx(whole, rel=1e-5)
    assert list(moved.values())[:6] == list(whole.values())[:6]


def test_resumes_with_one_then_two_then_one_process(tmp_path):
    """Faults: only the process that saved a state can restore it; batches depend on the reading process."""

    def train_to(step, processes, workdir):
        config = pathlib.Path(__file__).parents[1] / "support" / "toys" / "toy_many.py"
        knobs = {
            "optimizer.name": SHAMPOO,
            "optimizer.block_size": 8,
            "optimizer.interval": 4,
            "optimizer.refresh": "host",
            "data.row_seconds": 0.0,
            "duration": f"{step} steps",
            "schedule.warmup": "2 steps",
            "schedule.decay": "constant",
            "checkpoint.every": "6 steps",
            "checkpoint.keep_last": 9,
            "evaluation.every": "0 steps",
            "log.every": "1 steps",
            "may_change": "('duration',)",
        }
        command = [sys.executable, "-m", "shampax.launch.train", f"--config={config}", f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in knobs.items()]
        with Job(command, processes=processes, devices=2 // processes) as job:
            ended = job.wait()
        assert [each.code for each in ended] == [0] * processes, [each.err[-2000:] for each in ended]

    train_to(20, 1, tmp_path / "whole")
    cut_short(tmp_path / "whole", tmp_path / "moved", 6)
    for step, processes in ((12, 2), (20, 1)):
        train_to(step, processes, tmp_path / "moved")
    whole, moved = (
        {line["step"]: line["train/loss"] for line in lines(tmp_path / name) if "train/loss" in line}
        for name in ("whole", "moved")
    )
    assert len(whole) == 20
    assert moved == pytest.approx(whole, rel=1e-5)
