"""One run on ever other meshes."""

import jax
import pytest
from test_train import SHAMPOO, lines, make_config

from shampax.configs import base
from shampax.framework.stopping import StopSignals
from shampax.framework.train import train

STEPS = 26


def config(**mesh):
    optimizer = base.component(SHAMPOO, block_size=8, interval=4, refresh="host", ridge=1e-4)
    return make_config(
        optimizer=optimizer,
        **{"duration": f"{STEPS} steps", "log.every": "1 steps", "evaluation.every": "13 steps"} | mesh,
    )


def test_from_eight_devices_to_four_to_two_to_one(tmp_path, monkeypatch):
    """Catches statistics, roots (in flight, too) or momenta that come to another block, batches in another order."""
    train(config(**{"mesh.fsdp": 2, "mesh.tensor": 2}), tmp_path / "whole", devices=jax.devices())
    moving = [
        (6, 8, {"mesh.fsdp": 2, "mesh.tensor": 2}),
        (11, 4, {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2}),
        (17, 2, {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 2}),
        (STEPS, 1, {}),
    ]
    for stop, devices, mesh in moving:
        monkeypatch.setattr(StopSignals, "reason", lambda self, step, stop=stop: "SIGTERM" if step == stop else None)
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
