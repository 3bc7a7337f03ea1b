"""Workdirs in buckets, against emulators on loopback."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import buckets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_runs import make_config

from shampax.framework.base import parts, paths
from shampax.framework.base.errors import UserError
from shampax.framework.checkpoint import origin, ownership, shelf, store
from shampax.framework.checkpoint.record import Ranking, Record
from shampax.framework.checkpoint.saving import Checkpoints
from shampax.framework.reporting.runs import read_run
from shampax.framework.train import train

TOYS = Path(__file__).parents[2] / "support" / "toys"


@pytest.fixture(scope="module")
def bucket(request):
    """An emulated bucket of Google."""
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    with pytest.MonkeyPatch.context() as patch, buckets.google("here") as variables:
        for name, value in variables.items():
            patch.setenv(name, value)
        forget_file_systems()
        yield paths.of("gs://here")


def forget_file_systems():
    """Let fsspec read the variables again."""
    import fsspec
    from etils.epath.backend import fsspec_backend

    fsspec.config.set_conf_env(fsspec.config.conf)
    type(fsspec_backend)._get_filesystem.cache_clear()


def saved(workdir, *steps):
    """Save a small state at some steps, and keep all."""
    saver = Checkpoints(workdir, keep_last=9, keep_best=0, ranking=Ranking())
    for step in steps:
        saver.save({"params": {"w": jnp.arange(1024.0) + step}}, Record(step=step), {"format": 1})
    saver.confirm()
    saver.close()
    return [int(path.name) for path in store.checkpoints(workdir)]


def test_a_flipped_or_lost_object_is_found_and_its_step_saved_again(bucket):
    """Faults: damage in a bucket is not found; a checkpoint without its last object counts; what is damaged stays."""
    workdir = bucket / "damage"
    assert saved(workdir, 1, 2, 11) == [1, 2, 11]
    (workdir / "checkpoints" / "11" / shelf.COMMITTED).unlink()  # as a kill before the commit leaves it
    assert [path.name for path in store.checkpoints(workdir)] == ["1", "2"]
    lost, flipped = (workdir / "checkpoints" / name for name in "21")
    name = next(name for name in paths.files(lost) if "/d/" in name)
    (lost / name).unlink()
    name = next(name for name in paths.files(flipped) if "/d/" in name)
    content = bytearray((flipped / name).read_bytes())
    content[-1] ^= 1
    (flipped / name).write_bytes(bytes(content))
    with pytest.raises(UserError, match="every checkpoint"):
        origin.find(workdir, resume_from="", init_from="")
    content[-1] ^= 1
    (flipped / name).write_bytes(bytes(content))
    start = origin.find(workdir, resume_from="", init_from="")
    assert start.path == flipped and [path for path, _ in start.damaged] == [lost]
    assert "is missing" in start.damaged[0][1]
    origin.set_aside(workdir, start)
    assert shelf.damaged(workdir) == [lost] and store.checkpoints(workdir) == [flipped]
    assert saved(workdir, 2) == [1, 2] and shelf.damaged(workdir) == []
    assert store.faults(lost) == [] and not paths.files(workdir / "checkpoints" / "11")
    assert next(iter(store.read(lost, {"params/w": None}).values()))[0] == 2
    assert [part.tolist() for _, part in store.parts(lost, "params/w")] == [list(np.arange(1024.0) + 2)]
    shelf.delete(lost)
    assert store.checkpoints(workdir) == [flipped] and not paths.files(lost)


def test_a_living_owner_is_refused_and_a_silent_one_replaced(bucket):
    """Faults: two runs write one workdir in a bucket; a killed run blocks its workdir for ever."""
    workdir, over, entered = bucket / "owned", threading.Event(), threading.Event()

    def live():
        with ownership.hold(workdir, silence=1.2):
            entered.set()
            over.wait(30)

    first = threading.Thread(target=live)
    first.start()
    entered.wait(30)
    with pytest.raises(UserError, match="is in use by process"), ownership.hold(workdir, silence=1.2):
        pass
    over.set()
    first.join()
    assert not (workdir / "lock").exists()
    (workdir / "lock").write_text("process 1 on other, run 2\nsign of life 3; gone after 0.4 s without another\n")
    with ownership.hold(workdir) as still_ours:
        still_ours()
        (workdir / "lock").write_text("process 5 on other, run 6\n")
        with pytest.raises(UserError, match="taken over by process 5"):
            still_ours()
    assert "run 6" in (workdir / "lock").read_text()


def test_lines_in_parts_are_joined_and_cut(bucket, monkeypatch):
    """Faults: a part overwrites that of an earlier start; readers see one part; a resumed run keeps later lines."""
    monkeypatch.setattr(parts, "_FULL", 40)
    path = bucket / "lines" / "metrics.jsonl"
    for start in (0, 5):
        file = parts.Parts(path)
        for number in range(start, start + 5):
            file.append(json.dumps({"step": number, "text": "x" * 10}).encode() + b"\n")
            file.flush()
    names = [each.name for each in parts.parts(path)]
    assert names == [f"metrics-{number:05}.jsonl" for number in range(len(names))] and len(names) > 2
    parts.keep(path, lambda line: json.loads(line)["step"] < 7)
    assert [json.loads(line)["step"] for line in parts.lines(path)] == list(range(7))


def test_what_is_missing_is_said_in_one_line(monkeypatch):
    """Faults: a bucket without its library ends in a traceback; unknown schemes are taken for folders."""
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package s3fs. Install it: pip install 'shampax\[s3\]'"):
        paths.refuse_unusable("--workdir", "s3://here/run")
    with pytest.raises(UserError, match="gs://"):
        paths.given("azure://here/run")


KILLED = """
import os, signal, sys, threading, time
import jax
from toy_runs import make_config
from shampax.framework.base import paths
from shampax.framework.train import train

def kill():
    while not any(name.startswith("6/commit") for name in paths.files(paths.of(sys.argv[1]) / "checkpoints")):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill, daemon=True).start()
train(make_config(**eval(sys.argv[2])), sys.argv[1], devices=jax.devices()[:1])
"""
KNOBS = {
    "duration": "12 steps",
    "checkpoint.every": "2 steps",
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every": "6 steps",
    "evaluation.every": "4 steps",
    "evaluation.best_metric": "accuracy",
    "processes.death_seconds": 5.0,
    "log.every": "1 steps",
    "trackers": ("tensorboard",),
}


def arrays_of(path):
    """Return the bytes of each array of a checkpoint."""
    return {name: array.tobytes() for name, array in store.read(path, dict.fromkeys(store.arrays(path))).items()}


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "emulated"), [("gs", buckets.google), ("s3", buckets.amazon)])
def test_a_run_in_a_bucket_is_killed_and_resumed_bitwise(scheme, emulated, tmp_path, monkeypatch, capsys):
    """Faults: a resumed run in a bucket differs from one on a disk; other checkpoints are kept; metrics are lost."""
    for name in {"gs": ("gcsfs", "gcp_storage_emulator"), "s3": ("s3fs", "moto", "flask_cors")}[scheme]:
        pytest.importorskip(name)
    train(make_config(**KNOBS), tmp_path / "whole", devices=jax.devices()[:1])
    with emulated("other") as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        forget_file_systems()
        path = os.pathsep.join([str(TOYS), str(TOYS.parent), *sys.path])
        command = [sys.executable, "-c", KILLED, f"{scheme}://other/run", repr(KNOBS)]
        environment = os.environ | {"PYTHONPATH": path}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert ended.returncode == -9, ended.stderr[-2000:]
        workdir = paths.of(f"{scheme}://other/run")
        assert not (workdir / "result.json").exists() and store.checkpoints(workdir)
        capsys.readouterr()
        train(make_config(**KNOBS), workdir, devices=jax.devices()[:1])
        assert f"resuming from {workdir}/checkpoints/" in capsys.readouterr().out
        both = [read_run(place) for place in (tmp_path / "whole", workdir)]
        kept = [[path.name for path in store.checkpoints(run.path)] for run in both]
        assert kept[0] == kept[1] and {"6", "12"} <= {*kept[0]}
        for name in kept[0]:
            mine, theirs = (arrays_of(run.path / "checkpoints" / name) for run in both)
            assert mine == theirs
        curves = [[run.curve(key, "step") for key in ("train/loss", "heldout/accuracy")] for run in both]
        np.testing.assert_equal(*curves)
        assert {"config.json", "parameters.txt", "result.json", "metrics-00000.jsonl"} <= {*paths.files(workdir)}
        assert any("tfevents" in name for name in paths.files(workdir))
