import json
import subprocess
import sys

import jax
from toy_runs import make_config

from shampax.framework.reporting.metrics import MetricsWriter
from shampax.framework.reporting.runs import read_run
from shampax.framework.reporting.trackers.relay import Relay
from shampax.framework.reporting.trackers.tracker import TrackedRun
from shampax.framework.train import train


def write(workdir, step, values):
    run = TrackedRun("1d", "run", str(workdir), {})
    events = Relay("tensorboard", {"name": "shampax.framework.reporting.trackers.tensorboard:TensorBoard"}, run)
    writer = MetricsWriter(workdir, [events], after_step=0, evaluated=True)
    writer.write(step=step, seconds=1.23456, tokens=10 * step, values=values)
    writer.close(complete=True)


def test_lines_and_events(tmp_path):
    write(tmp_path, 1, {"train/loss": 2.5, "train/skipped": 0, "heldout/loss": float("nan")})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {
        "step": 1,
        "seconds": 1.235,
        "tokens": 10,
        "train/loss": 2.5,
        "train/skipped": 0,
        "heldout/loss": None,
    }
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"train/loss", "heldout/loss"} <= set(events.Tags()["scalars"])
    (measured,) = events.Scalars("train/loss")
    assert (measured.step, measured.value) == (1, 2.5)


def test_resuming_drops_later_and_truncated_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "seconds": 0.5, "tokens": 9, "a": {step}}}\n' for step in (1, 5, 5, 6)]
    damaged = b'[1]\n{"step": 1}\n{"step": "1"}\n\xff\n{"step": 4, "a"\n'
    path.write_bytes(lines[0].encode() + damaged + "".join(lines[1:]).encode() + b'{"step": 7, "a"')
    MetricsWriter(tmp_path, after_step=5, evaluated=True).close(complete=True)
    assert path.read_text() == "".join(lines[:3])


def test_layers_are_named_once_and_dropped_on_resume(tmp_path):
    """Faults: the table doubles in length; after a resume it has steps twice."""
    writer = MetricsWriter(tmp_path, after_step=0, evaluated=True)
    for step in (1, 2, 3):
        writer.layers(step, ["a", "b"], {"condition": [12345.678, float("nan")]})
    writer.layers(4, [], {})
    writer.close(complete=True)
    MetricsWriter(tmp_path, after_step=2, evaluated=True).close(complete=True)
    first, second = map(json.loads, (tmp_path / "layers.jsonl").read_text().splitlines())
    assert first == {"step": 1, "names": ["a", "b"], "condition": [12350.0, None]}
    assert second == {"step": 2, "condition": [12350.0, None]}


def test_lines_are_written_again_after_a_full_disk(tmp_path, capsys):
    """Faults: a full disk ends the run; it is reported at each step; a line cut short spoils the next one."""
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(tmp_path, after_step=0, evaluated=True)
    path.mkdir()  # open fails, as on a full disk
    for step in (1, 2):
        writer.write(step=step, seconds=1.0, tokens=1, values={})
    path.rmdir()
    path.write_text('{"step": 3, "sec')
    writer.write(step=4, seconds=1.0, tokens=1, values={})
    writer.close(complete=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: measurements are missing in metrics.jsonl (IsADirectoryError: ")
    assert read_run(tmp_path).points.axes["step"] == [4]


def test_a_run_that_cannot_write_its_reports_trains_to_its_end(tmp_path, capfd):
    """Fault: everything is trained, then a traceback in place of result.json."""
    for name in ("metrics.jsonl", "parameters.txt"):
        (tmp_path / name).mkdir()
    (tmp_path / "tracked.txt").mkdir()
    broken = ("bad.name=trackers:Recorder", f"bad.path={tmp_path}")
    result = train(make_config(duration="3 steps", trackers=broken), tmp_path, devices=jax.devices()[:1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert (result["steps"], result["stopped"]) == (3, None)
    assert capfd.readouterr().out.count("warning: ") == 4


def test_training_imports_neither_tensorflow_nor_flax_nor_plotly():
    """Fault: the first step comes seconds later."""
    code = (
        "import sys, shampax.framework.train, shampax.launch.train\n"
        "sys.exit(not {'tensorflow', 'flax', 'plotly'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
