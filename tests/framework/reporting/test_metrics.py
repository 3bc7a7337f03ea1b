import json
import subprocess
import sys

import pytest

from shampax.framework.reporting.metrics import MetricsWriter


def write(workdir, step, values, after_step=0):
    writer = MetricsWriter(workdir, after_step=after_step, evaluated=True)
    writer.write(step=step, seconds=1.23456, tokens=10 * step, values=values)
    writer.close()


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
    MetricsWriter(tmp_path, after_step=5, evaluated=True).close()
    assert path.read_text() == "".join(lines[:3])


def test_errors_in_the_background_are_raised(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    with pytest.raises(ImportError):
        write(tmp_path, 1, {"a": 1.0})
    assert (tmp_path / "metrics.jsonl").exists()


def test_importing_the_trainer_does_not_import_tensorflow():
    code = "import sys, shampax.framework.train; sys.exit('tensorflow' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
