import json
import os
import socket
import time

import numpy as np
import pytest

from shampax.framework.base import workdir
from shampax.framework.reporting import status
from shampax.framework.reporting.runs import read_run


def made(path, losses=(5.0, 4.0, 3.0), *, every=10, pace=0.5, result=None, config=None, lock=None, **keys):
    """Return a run with an evaluation every `every` steps of `pace` seconds, and other measurements by key."""
    path.mkdir()
    lines = []
    for i, loss in enumerate(losses):
        step = every * (i + 1)
        more = {name: values[i] for name, values in keys.items()}
        lines.append(
            {"step": step, "seconds": pace * step, "tokens": step, "heldout/loss": loss, "train/loss": loss} | more
        )
    (path / workdir.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if result is not None:
        whole = {"steps": step, "seconds": pace * step, "tokens": step, "heldout_loss": loss, "best_heldout_loss": loss}
        (path / workdir.RESULT).write_text(json.dumps(whole | {"stopped": None} | result))
    (path / workdir.CONFIG).write_text(json.dumps({"duration": "100 steps"} | (config or {})))
    if lock:
        (path / workdir.LOCK).write_text(lock)
    return read_run(path)


def holder(process, machine=None):
    return f"process {process} on {machine or socket.gethostname()}, run 0123456789ab\n"


@pytest.mark.parametrize(
    ("result", "lock", "old", "expected"),
    [
        ({}, None, 0, "complete"),
        ({"stopped": "SIGTERM"}, None, 0, "stopped"),
        ({"stopped": "20 consecutive steps were skipped"}, None, 0, "failed"),
        pytest.param(None, holder(os.getpid()), 90_000, "running", id="a living process"),
        (None, holder(2**22 + 1), 0, "failed"),
        (None, holder(1, "elsewhere"), 0, "running"),
        (None, holder(1, "elsewhere"), 90_000, "failed"),
    ],
)
def test_states(tmp_path, result, lock, old, expected):
    """Faults: a killed run seems to run; a run on another machine seems dead; a refusal of the guard seems an order."""
    run = made(tmp_path / "run", result=result, lock=lock)
    os.utime(run.path / workdir.METRICS, times=(time.time() - old,) * 2)
    assert status.state(run).kind == expected


def test_time_left_follows_the_latest_speed(tmp_path):
    """Fault: the slow first steps make the rest seem long."""
    run = made(tmp_path / "run", np.linspace(5, 3, 40), every=1, pace=60.0)
    lines = [json.loads(line) for line in (run.path / workdir.METRICS).read_text().splitlines()]
    for line in lines[15:]:
        line["seconds"] = 900 + 2 * (line["step"] - 15)
    (run.path / workdir.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    fact = {fact.label: fact for fact in status.facts(read_run(run.path), None, status.HELDOUT)}["Time left"]
    assert fact.value == "2 min"  # 60 steps at 2 s


@pytest.mark.parametrize(
    ("steps", "ended", "told"),
    [
        (3, True, "1.0000 below base, whose end it reached after 67% of the steps"),
        (2, False, "0.5000 below base at step 20"),
        (4, False, "1.0000 below base at step 30"),
    ],
)
def test_loss_against_the_baseline(tmp_path, steps, ended, told):
    """Fault: a run that is ahead in steps seems better than its baseline."""
    base = made(tmp_path / "base", (5.0, 4.0, 3.0), result={} if ended else None)
    run = made(tmp_path / "run", (5.0, 3.0 if ended else 3.5, 2.0, 1.0)[:steps], result={} if ended else None)
    fact = status.facts(run, base, status.HELDOUT)[0]
    assert (fact.label, fact.note) == ("Held-out loss", told)


def test_what_is_wrong_is_told(tmp_path):
    """Fault: a run that needs a hand looks like any other."""
    assert status.wrong(made(tmp_path / "fine")) == []
    keys = {
        "train/skipped": (0, 1, 2),
        "throughput/input_wait": (0.5, 0.5, 0.5),
        "optimizer/8x8/fallbacks": (4, 4, 4),
        "optimizer/8x8/failures": (0, 1, 1),
    }
    run = made(tmp_path / "bad", (5.0, 4.0, 4.5), **keys)
    (run.path / workdir.STALLS).mkdir()
    told = status.wrong(run)
    for expected in (
        "2 steps were skipped",
        "overfits",
        "4 blocks",
        "refreshes of roots: 1 in a row",
        "50% of the time",
        "stalls",
    ):
        assert sum(expected in line for line in told) == 1, (expected, told)
    assert "diverges" in status.wrong(made(tmp_path / "up", (4.0, 5.0, 6.0, 7.0, 8.0)))[0]


def test_times_in_two_units():
    spans = {
        5.25: "5.2 s",
        59: "59 s",
        96.4: "1 min 36 s",
        3600: "1 h",
        11_520: "3 h 12 min",
        200_000: "2 d 8 h",
        86_400: "1 d",
    }
    assert {seconds: status.span(seconds) for seconds in spans} == spans
