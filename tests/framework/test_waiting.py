"""Runs that wait for rows which are being made."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import LIMIT, Job
from toy_runs import arrays, lines, make_config, saved, two

from shampax.configs import base
from shampax.framework.base.errors import TrainingStopped
from shampax.framework.train import train

CONFIG = Path(__file__).parents[1] / "support" / "toys" / "toy_growing.py"
FAILURE = "data file /corpus/b.txt: cannot be read. Replace or remove it."


@pytest.fixture
def growing(tmp_path, monkeypatch):
    """Return the folder that says how many rows exist."""
    (tmp_path / "growing").mkdir()
    monkeypatch.setenv("GROWING", str(tmp_path / "growing"))
    return tmp_path / "growing"


def config():
    config = make_config(**{"checkpoint.every": "50 steps"})
    config.data = base.component("toy_growing:GrowingData")
    return config


def asked(growing, row, seconds=LIMIT):
    """Wait until the run has asked for a row twice: it waits."""
    path, times, end = growing / "asked", set(), time.monotonic() + seconds
    while len(times) < 2 and time.monotonic() < end:
        if path.exists() and path.read_text() == f"{row}":
            times.add(path.stat().st_mtime_ns)
        time.sleep(0.02)


def test_a_run_that_waits_for_rows_ends_at_once_with_a_checkpoint(growing, tmp_path):
    """Faults: rows that cannot be made end the run without a save, or without the reason; a signal waits for rows; the
    rerun is another run."""
    (growing / "rows").write_text("1_000")
    whole = train(config(), tmp_path / "whole", devices=two())
    (growing / "rows").write_text("30")  # of which the fourth batch needs 32
    (growing / "failed").write_text(FAILURE)
    with pytest.raises(TrainingStopped, match=rf"{FAILURE}; a checkpoint of step 3 is saved in"):
        train(config(), tmp_path / "run", devices=two())
    assert saved(tmp_path / "run") == [3]
    (growing / "failed").unlink()
    (growing / "rows").write_text("50")
    came = threading.Timer(10, (growing / "rows").write_text, ("1_000",))

    def stop():
        asked(growing, 55)
        came.start()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    stopped = train(config(), tmp_path / "run", devices=two())
    came.cancel()
    assert (stopped["stopped"], stopped["steps"], saved(tmp_path / "run")[-1]) == ("SIGTERM", 6, 6)
    (growing / "rows").write_text("1_000")
    assert train(config(), tmp_path / "run", devices=two())["heldout_loss"] == whole["heldout_loss"]
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path / "run", 12), arrays(tmp_path / "whole", 12))


@pytest.mark.slow
def test_processes_that_wait_for_rows_end_together(growing, tmp_path):
    """Faults: a signal to a process that makes no rows waits for them; the processes stop at different steps."""
    (growing / "rows").write_text("30")
    command = [sys.executable, "-m", "shampax.launch.train", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}"]
    with Job(command, processes=2, devices=1) as job:
        asked(growing, 31)
        job.processes[1].send_signal(signal.SIGTERM)
        ended = job.wait()
    assert [each.code for each in ended] == [128 + signal.SIGTERM] * 2, ended
    assert max(each.seconds for each in ended) < 15
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == saved(tmp_path / "run")[-1] == 3
