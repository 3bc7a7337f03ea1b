import contextlib
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from shampax.framework.base.durations import Period
from shampax.framework.checkpoint.record import Record
from shampax.framework.reporting import progress
from shampax.framework.reporting.journal import Journal
from shampax.framework.sharding import meshes

COUNTS = {"skipped": 0, "consecutive_skips": 0}
STEP = COUNTS | {"loss": 2.0, "learning_rate": 0.1}


@pytest.fixture
def journal():
    pace = {"total_steps": 1000, "tokens_per_step": 64}
    speedometer = progress.Speedometer(meshes.make_mesh({"data": -1}), examples_per_step=4, flops_per_step=1.0, **pace)
    return Journal(None, speedometer, progress.Clock(0.0), (), start=Record(), period=Period(100), **pace)


def done(journal, step, **changes):
    journal.step_done(step, {name: jnp.asarray(value) for name, value in (STEP | changes).items()})


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
