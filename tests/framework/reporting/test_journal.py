import contextlib
import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from shampax.framework.base.durations import Period
from shampax.framework.checkpoint.record import Record
from shampax.framework.reporting import progress
from shampax.framework.reporting.journal import Journal
from shampax.framework.reporting.metrics import MetricsWriter
from shampax.framework.sharding import meshes
from shampax.framework.step.scalars import Scalars

COUNTS = {"skipped": 0, "consecutive_skips": 0}
STEP = COUNTS | {"loss": 2.0, "learning_rate": 0.1}


def journal_of(writer=None):
    pace = {"total_steps": 1000, "tokens_per_step": 64}
    speedometer = progress.Speedometer(meshes.make_mesh({"data": -1}), examples_per_step=4, flops_per_step=1.0, **pace)
    more = {"start": Record(), "period": Period(100), "by_layer": dict, **pace}
    return Journal(writer, speedometer, progress.Clock(0.0), (), **more)


@pytest.fixture
def journal():
    return journal_of()


def done(journal, step, **changes):
    journal.step_done(step, Scalars.pack({name: jnp.asarray(value) for name, value in (STEP | changes).items()}))


def test_the_longest_row_of_skips_is_remembered(journal):
    """Fault: a limit was reached, but it is forgotten when the step in flight is good."""
    for step, skips in enumerate((0, 1, 2, 3, 0, 1), start=1):
        done(journal, step, consecutive_skips=skips)
    assert journal.most_consecutive_skips == 3


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), BrokenPipeError()])
def test_only_a_closed_output_ends_a_run(journal, monkeypatch, error):
    """Faults: a log file on a full disk ends a run of days; a run continues although its output is closed."""

    def write(*_):
        raise error

    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=write, flush=write))
    with pytest.raises(BrokenPipeError) if isinstance(error, BrokenPipeError) else contextlib.nullcontext():
        done(journal, 1)


def test_every_step_is_recorded_and_written_at_reports_and_pauses(tmp_path):
    """Faults: only reported steps are recorded; a file is opened in every step; a checkpoint overtakes its metrics."""
    journal = journal_of(MetricsWriter(tmp_path, after_step=0, evaluated=True))
    counts = []
    for step in range(1, 103):
        done(journal, step, loss=0.1)
        counts.append(len((tmp_path / "metrics.jsonl").read_text().splitlines()))
    journal.flush()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    journal.close(complete=False)
    assert counts == [1] * 99 + [100] * 3
    assert [line["step"] for line in lines] == [*range(1, 103)]
    assert {line["train/loss"] for line in lines} == {0.1}  # the shortest number with these 32 bits
