"""Workdirs in buckets, against emulators on loopback."""

import json
import sys
import threading
import time

import buckets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import LIMIT, Job
from toy_runs import make_config

from shampax.framework.base import parts, paths
from shampax.framework.base.errors import UserError
from shampax.framework.checkpoint import origin, ownership, shelf, store
from shampax.framework.checkpoint.record import Ranking, Record
from shampax.framework.checkpoint.saving import Checkpoints
from shampax.framework.config import check
from shampax.framework.reporting.runs import LAYER_METRICS, Reader, read_run
from shampax.framework.train import train
from shampax.launch import report, sweep


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
    assert [part.tolist() for _, part in store.parts(lost)("params/w")] == [list(np.arange(1024.0) + 2)]
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


def test_a_run_in_a_bucket_is_reported_from_all_parts(bucket, tmp_path, monkeypatch, capsys):
    """Faults: a report fails or shows one part; watching reads full parts again; a sweep fails halfway."""
    monkeypatch.setattr(parts, "_FULL", 150)
    workdir, layers = bucket / "reported", {name: [1.0, 2.0] for name in LAYER_METRICS}
    metrics, table = parts.Parts(workdir / "metrics.jsonl"), parts.Parts(workdir / "layers.jsonl")
    (workdir / "starts.jsonl").write_text('{"total_steps": 8}\n')
    (workdir / "config.json").write_text('{"optimizer": {"name": "Shampoo"}}')
    reader = Reader(workdir)
    for step in range(1, 7):
        axes = {"step": step, "seconds": step * 0.5, "tokens": step * 100}
        metrics.append(json.dumps(axes | {"train/loss": 6 - step / 10}).encode() + b"\n")
        table.append(json.dumps({"step": step, "names": ["a", "b"]} | layers).encode() + b"\n")
        for file in (metrics, table):
            file.flush()
        assert reader.read().steps == step
    assert len(parts.parts(workdir / "metrics.jsonl")) > 1 and 0 < reader.bytes_read < 250
    np.testing.assert_equal(reader.read().points, read_run(workdir).points)
    assert report.main([f"{workdir}", f"--output={tmp_path}"]) == 0
    assert f"{workdir}: running: 6 of 8 steps" in capsys.readouterr().out
    page = json.loads((tmp_path / "index.html").read_text().split('id="data">')[1].split("</script>")[0])
    assert page["about"][0]["path"] == str(workdir) and page["runs"][0]["facts"][0]["value"] == "5.4000"
    assert page["layers"] and page["about"][0]["starts"] == [[["total steps", "8"]]]
    words = ["--config=lm:bytes", f"--workdir={workdir}", "--over", "seed=0,1"]
    assert sweep.main(words) == 2 and "which a bucket cannot hold. Use a folder." in capsys.readouterr().err


def test_what_is_missing_is_said_in_one_line(monkeypatch):
    """Faults: a bucket without its library ends in a traceback; unknown schemes are taken for folders."""
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package s3fs. Install it: pip install 'shampax\[s3\]'"):
        paths.refuse_unusable("--workdir", "s3://here/run")
    with pytest.raises(UserError, match="gs://"):
        paths.given("azure://here/run")


SLOW = """
from shampax.configs import base
from toy_runs import make_config

def get_config():
    config = make_config(**{knobs})
    config.data = base.component("toy_many:ManyData", row_seconds={seconds})
    return config
"""
KNOBS = {
    "duration": "12 steps",
    "checkpoint.every": "3 steps",
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every": "6 steps",
    "evaluation.every": "6 steps",
    "evaluation.best_metric": "accuracy",
    "processes.death_seconds": 5.0,
    "log.every": "1 steps",
    "trackers": ("tensorboard",),
}


def arrays_of(path):
    """Return the bytes of each array of a checkpoint."""
    return {name: array.tobytes() for name, array in store.read(path, dict.fromkeys(store.arrays(path))).items()}


def wait_for(workdir, name):
    """Wait until the checkpoints have an object whose path has this part."""
    end = time.monotonic() + LIMIT
    while not any(name in found for found in paths.files(workdir / "checkpoints")):
        assert time.monotonic() < end
        time.sleep(0.3)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "emulated", "processes"), [("gs", buckets.google, 2), ("s3", buckets.amazon, 1)])
def test_a_run_in_a_bucket_is_killed_and_resumed_bitwise(scheme, emulated, processes, tmp_path, monkeypatch):
    """Faults: a resumed run in a bucket differs from one on a disk; the processes of a run write each other's parts, or
    survive one of them; another run is let in; other checkpoints are kept; metrics are lost."""
    for name in {"gs": ("gcsfs", "gcp_storage_emulator"), "s3": ("s3fs", "moto", "flask_cors")}[scheme]:
        pytest.importorskip(name)
    train(make_config(**KNOBS), tmp_path / "whole", devices=jax.devices()[:processes])
    (tmp_path / "slow.py").write_text(SLOW.format(knobs=KNOBS, seconds=0.15 * processes))
    with emulated("other") as variables:
        for name, value in (variables | {"JAX_PROCESS_ID": "0"}).items():
            monkeypatch.setenv(name, value)
        forget_file_systems()
        workdir = paths.of(f"{scheme}://other/run")
        command = [sys.executable, "-m", "shampax.launch.train", f"--config={tmp_path}/slow.py", f"--workdir={workdir}"]
        with Job(command, processes=processes, devices=1) as job:
            wait_for(workdir, "/commit")
            with pytest.raises(UserError, match=r"run is in use by process \d+ on "):
                train(check.load(f"{tmp_path}/slow.py"), workdir, devices=jax.devices()[:1])
            wait_for(workdir, "6/commit")  # which is kept
            job.processes[-1].kill()
            ended = job.wait()
        assert [each.code for each in ended] == [75, -9][-processes:], ended
        assert not (workdir / "result.json").exists() and store.checkpoints(workdir)
        with Job(command, processes=processes, devices=1) as job:
            ended = job.wait()
        assert [each.code for each in ended] == [0] * processes, ended
        assert f"resuming from {workdir}/checkpoints/" in ended[0].out
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
