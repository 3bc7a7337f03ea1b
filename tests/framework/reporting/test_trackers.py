import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import jax
import pytest
import shrunk
from toy_runs import ADAMW, make_config
from trackers import recorded, wandb_points

from shampax.configs import base
from shampax.framework.base.errors import UserError
from shampax.framework.reporting.trackers import choice, relay
from shampax.framework.reporting.trackers.tracker import TrackedRun
from shampax.framework.train import train

RECORDER = "mine.name=trackers:Recorder"


def sections(*given):
    config = base.get_config()
    config.trackers = given
    return choice.chosen(config)


def relay_of(tmp_path, *options):
    own = [f"mine.{option}" for option in options]
    section = sections(RECORDER, f"mine.path={tmp_path / 'calls'}", *own)["mine"]
    return relay.Relay("mine", section, TrackedRun("1d", "run", str(tmp_path), {"seed": 0}))


def test_messages_arrive_in_order(tmp_path):
    """Faults: a message is lost; a NaN ends the tracker; a run that stops is tracked as complete."""
    for complete in (False, True):
        tracker = relay_of(tmp_path)
        tracker.send(step=1, values={"loss": float("nan")})
        tracker.send(step=1, texts=[{"prompt": "The", "text": " é"}])
        tracker.close(complete)
    calls = recorded(tmp_path / "calls")
    assert [call[0] for call in calls] == ["open", "scalars", "texts", "close"] * 2
    assert calls[0][1:] == ["1d", "run"] and calls[2] == ["texts", 1, [{"prompt": "The", "text": " é"}]]
    assert [calls[3], calls[7]] == [["close", False], ["close", True]]


@pytest.mark.parametrize(
    ("fails_at", "how", "told"),
    [
        ("open", "raises", "OSError: [Errno 28] No space left on device"),
        ("scalars", "ends", "SystemExit: 0"),
        ("close", "raises", "OSError: "),
        ("scalars", "dies", "it ended"),
    ],
)
def test_a_tracker_that_fails_is_one_warning(tmp_path, capfd, fails_at, how, told):
    """Faults: the run ends with the tracker; a warning for each step; none if the process dies."""
    tracker = relay_of(tmp_path, f"fails_at={fails_at}", f"how={how}")
    for step in range(3):
        tracker.send(step=step, values={"loss": 1.0})
        if tracker._process and fails_at != "close":
            tracker._process.wait(60)
    tracker.close(True)
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith(f"warning: the tracker mine is off ({told}") and "Training continues" in line


def test_a_missing_package_is_named(tmp_path, capfd, monkeypatch):
    """Fault: a traceback, or nothing, where an extra is not installed."""
    (tmp_path / "wandb.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    tracker = relay.Relay("wandb", sections("wandb")["wandb"], TrackedRun("1d", "run", str(tmp_path), {}))
    tracker.send(step=1, values={})
    tracker.close(True)
    assert "No module named 'a_package_that_is_missing'. Install it: pip install wandb)" in capfd.readouterr().out


def too_long(*_):
    raise TimeoutError("a step waits for its tracker")


def test_a_tracker_that_hangs_costs_no_time(tmp_path, capfd, monkeypatch):
    """Faults: a step waits for a full pipe; memory grows without bound; the run never ends."""
    monkeypatch.setitem(relay.LAST_SECONDS, True, 0.2)
    monkeypatch.setattr(relay, "_MOST_PENDING", 2**20)
    waited = signal.signal(signal.SIGALRM, too_long)
    for last, told in ((200, "not finished after 0 s"), (2000, "it lags 1 MiB behind")):
        tracker = relay_of(tmp_path, "fails_at=open", "how=hangs")
        signal.alarm(30)  # ends the wait for a full pipe
        for step in range(last):
            tracker.send(step=step, values={"x" * 1000: 1.0})
        tracker.close(True)
        signal.alarm(0)
        (line,) = capfd.readouterr().out.splitlines()
        assert told in line
        assert tracker._process and tracker._process.poll() is not None
    signal.signal(signal.SIGALRM, waited)


def test_a_killed_run_leaves_its_tracker_to_finish(tmp_path):
    """Fault: what a tracker holds in memory is lost with the run."""
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from shampax.framework.reporting.trackers.relay import Relay\n"
        "from shampax.framework.reporting.trackers.tracker import TrackedRun\n"
        "section = {'name': 'trackers:Recorder', 'path': sys.argv[2]}\n"
        "Relay('mine', section, TrackedRun('1d', 'run', '', {})).send(step=1, values={})\n"
        "os.kill(os.getpid(), 9)"
    )
    support = os.path.dirname(sys.modules["trackers"].__file__ or "")
    subprocess.run([sys.executable, "-c", script, support, tmp_path / "calls"], check=False)
    deadline = time.monotonic() + 60
    while (calls := recorded(tmp_path / "calls"))[-1:] != [["close", False]] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [call[0] for call in calls] == ["open", "scalars", "close"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("wandbb",), "no tracker is called 'wandbb'. Did you mean 'wandb'? For"),
        (("wandb.projekt=a",), "projekt"),
        (("wandb.project",), "'wandb.project' is not of the form name or name.option=value"),
        (("mine.name=trackers:Nothing",), "trackers has no dataclass 'Nothing'"),
    ],
)
def test_unknown_trackers_are_refused_before_the_run(given, told):
    with pytest.raises(UserError) as error:
        sections(*given)
    assert told in str(error.value) and str(error.value).startswith("config.trackers")


def test_a_run_outlives_its_trackers_and_a_resumed_one_continues_them(tmp_path, capfd):
    """Faults: a tracker ends the run; a resumed run is another one for its trackers."""
    path, workdir = tmp_path / "calls", tmp_path / "run"
    bad = ("bad.name=trackers:Recorder", f"bad.path={tmp_path / 'bad'}", "bad.fails_at=scalars")
    trackers = (RECORDER, f"mine.path={path}", *bad)
    for duration in ("3 steps", "5 steps"):
        config = make_config(duration=duration, trackers=trackers, may_change=("duration",))
        assert train(config, workdir, devices=jax.devices()[:1])["stopped"] is None
    calls = recorded(path)
    begun = [call for call in calls if call[0] == "open"]
    assert begun == [["open", (workdir / "tracked.txt").read_text().strip(), "run"]] * 2
    steps = [call[1] for call in calls if call[0] == "scalars" and "train/loss" in call[2]]
    assert steps == [1, 2, 3, 4, 5]  # reports are due every two steps, and at the end
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {1, 2, 3, 4, 5}
    assert capfd.readouterr().out.count("warning: the tracker bad is off") == 2  # once in each process of the run


@pytest.mark.slow
def test_wandb_mlflow_and_aim_receive_a_run_of_the_sample(tmp_path):
    """Faults: an option of a package has changed; a step is missing; the resumed run is another one or starts over."""
    names = ["tensorboard", "wandb", "wandb.mode=offline", "mlflow"]
    with_aim = importlib.util.find_spec("aim") is not None  # it has no wheel for Python 3.13
    names += ["aim", f"aim.repo={tmp_path}"] if with_aim else []
    small = ["log.every=2 steps", "evaluation.every=2 steps", "samples.every=2 steps", "trackers=" + ",".join(names)]
    workdir, small = tmp_path / "run", [*small, f"optimizer.name={ADAMW}"]
    command = [sys.executable, "-m", "shampax", "train", "--config=lm:sample", f"--workdir={workdir}"]
    command += [f"--config.{knob}" for knob in (*shrunk.LM, *small)]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_NUM_CPU_DEVICES": "1"}
    for duration in ("4 steps", "6 steps"):
        words = ["--change", f"duration={duration}"] if workdir.exists() else [f"--config.duration={duration}"]
        done = subprocess.run(
            [*command, *words], env=environ, capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 0 and "warning: the tracker" not in done.stdout, done.stdout + done.stderr
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    losses = {step: losses[step] for step in (1, 2, 4, 6)}
    heldout = {line["step"]: line["heldout/loss"] for line in lines if "heldout/loss" in line}
    (id,) = (workdir / "tracked.txt").read_text().split()

    found: dict[int, float] = {}
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        run, points = wandb_points(path)
        assert run == (id, "shampax")
        found |= {step: values["train/loss"] for step, values in points if "train/loss" in values}
        assert any("samples/path" in values for _, values in points)
    assert found == losses

    mlflow = pytest.importorskip("mlflow")
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("shampax").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags["shampax.run"]) == ("run", "FINISHED", id)
    assert run.data.params["batch_size"] == "16" and run.data.params["duration"] == "4 steps"
    assert {each.step: each.value for each in client.get_metric_history(run.info.run_id, "train/loss")} == losses
    assert {each.step: each.value for each in client.get_metric_history(run.info.run_id, "heldout/loss")} == heldout

    if with_aim:
        import aim

        repo = aim.Repo.from_path(str(tmp_path))
        repo._recreate_index()
        (run,) = repo.iter_runs()
        (curve,) = [metric for metric in run.metrics() if metric.name == "train/loss"]
        steps, (values, *_) = curve.data.items_list()
        assert dict(zip(steps, values, strict=True)) == pytest.approx(losses)
        assert run.get("config")["batch_size"] == 16 and run.name == "run"
