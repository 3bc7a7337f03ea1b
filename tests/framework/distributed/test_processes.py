import json
import pathlib
import re
import signal
import sys
import time

import jax
import numpy as np
import pytest
from processes import LIMIT, Job, script
from toy_runs import arrays, lines, saved

CONFIG = pathlib.Path(__file__).parents[2] / "support" / "toys" / "toy_many.py"
RESUME = "rerun the same command to resume from the latest checkpoint."


def training(workdir, fault="", *flags):
    """Start the real command in two processes."""
    command = [sys.executable, "-m", "shampax.launch.train", f"--config={CONFIG}", f"--workdir={workdir}", *flags]
    return Job(command, processes=2, devices=1, variables={"FAULT": fault})


def step_of(workdir):
    """Return the last step in the run's log."""
    path = workdir / "metrics.jsonl"
    complete = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return json.loads(complete[-1])["step"] if complete else 0


def signalled(workdir, number, index):
    """Send a signal to a process after the run has logged a new step. Return how the processes ended."""
    before = step_of(workdir)
    with training(workdir) as job:
        end = time.monotonic() + LIMIT
        while step_of(workdir) <= before and time.monotonic() < end:
            time.sleep(0.02)
        job.processes[index].send_signal(number)
        return job.wait()


def last_line(ended):
    return ended.err.splitlines()[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("many") / "whole"
    with training(workdir) as job:
        assert [ended.code for ended in job.wait()] == [0, 0]
    return workdir


@pytest.mark.slow
def test_a_failing_stopped_and_killed_run_ends_as_an_undisturbed_one(whole, tmp_path):
    """Faults: a step is evaluated before it is saved, and all steps since the last save are lost; the other process
    waits in a collective of the evaluation; a signal stops only one process, or another step; a survivor hangs or has
    another exit code; a process whose directory listing is old resumes from an older checkpoint."""
    with training(tmp_path, "heldout 1") as job:
        ended = job.wait()
    assert [each.code for each in ended] == [2, 2]
    message = "error: a held-out row is damaged\n"
    assert [each.err for each in ended] == [f"process 1: {message}", message]
    assert saved(tmp_path)[-1] == 20

    for number, index in ((signal.SIGTERM, 1), (signal.SIGINT, 0)):
        ended = signalled(tmp_path, number, index)
        assert [each.code for each in ended] == [128 + number] * 2
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["stopped"] == number.name
        assert saved(tmp_path)[-1] == result["steps"] < 80

    for index in (1, 0):
        ended = signalled(tmp_path, signal.SIGKILL, index)
        survivor = ended[1 - index]
        assert ended[index].code == -signal.SIGKILL
        assert survivor.seconds < 30
        assert "Traceback" not in survivor.err
        if index == 0 and survivor.code == -signal.SIGABRT:
            continue  # JAX noticed first
        assert survivor.code == 75
        assert last_line(survivor).startswith(f"error: process {index} of 2 has died")
        assert last_line(survivor).endswith(RESUME)

    with training(tmp_path, "stale 1") as job:
        assert [ended.code for ended in job.wait()] == [0, 0]
    assert lines(tmp_path) == lines(whole)
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path, 80), arrays(whole, 80))


@pytest.mark.slow
def test_a_signal_during_an_evaluation_stops_the_run_within_a_batch(tmp_path):
    """Fault: a signal waits for the end of the evaluation, here 10 s, and the machine is gone before the save."""
    with training(tmp_path, "", "--config.data.heldout_rows=160", "--config.data.heldout_seconds=0.25") as job:
        end = time.monotonic() + LIMIT
        while not (tmp_path / "checkpoints" / "20").exists() and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(1)
        job.processes[1].send_signal(signal.SIGTERM)
        ended = job.wait()
    assert [each.code for each in ended] == [128 + signal.SIGTERM] * 2
    assert max(each.seconds for each in ended) < 6
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == saved(tmp_path)[-1] == 20
    assert not any("heldout/loss" in line for line in lines(tmp_path))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("options 1", "config.data: row_seconds is refused"),
        pytest.param("input 1", "no rows for train", marks=pytest.mark.slow),
    ],
    ids=["before JAX has started", "after"],
)
def test_a_user_error_of_one_process_ends_all(fault, message, tmp_path):
    with training(tmp_path / "work", fault) as job:
        ended = job.wait()
    assert [each.code for each in ended] == [2, 2]
    assert [each.err for each in ended] == [f"process 1: error: {message}\n", f"error: {message}\n"]


@pytest.mark.slow
def test_a_failing_process_prints_its_traceback_and_ends_all(tmp_path):
    """Fault: the other process waits forever in a collective."""
    with training(tmp_path, "row 1") as job:
        ended = job.wait()
    assert [each.code for each in ended] == [75, 1]
    assert "Traceback" in ended[1].err
    assert "LookupError: row" in ended[1].err
    assert last_line(ended[0]).startswith("error: process 1 has failed (LookupError: row")
    assert "Traceback" not in ended[0].err


@pytest.mark.slow
def test_a_frozen_process_ends_the_run_after_the_time_of_the_watchdog(tmp_path):
    """Fault: the others wait in a collective forever, or until JAX aborts them."""
    with training(tmp_path, "", "--config.watchdog.end_after=15", "--config.processes.death_seconds=60") as job:
        end = time.monotonic() + LIMIT
        while not step_of(tmp_path) and job.processes[0].poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        job.processes[1].send_signal(signal.SIGSTOP)
        job.processes[0].wait(LIMIT)
        job.processes[1].send_signal(signal.SIGCONT)
        ended = job.wait()
    assert [each.code for each in ended] == [75, 75]
    assert re.match(r"error: process 0: no progress for 1\d s in 'step' after step ", last_line(ended[0]))
    assert last_line(ended[1]) == last_line(ended[0])
    assert last_line(ended[0]).endswith(RESUME)


@pytest.mark.slow
def test_processes_agree_and_one_that_ends_early_ends_the_run():
    """Faults: long texts are truncated; only process 0 raises; a finished process waits forever."""
    text = """
        group = Group(place)
        group.join({}, waiting_seconds=120, death_seconds=5)
        group._waiting_seconds = 2.0  # in `leave`
        from shampax.framework.distributed import agreement
        texts = ["", "\\u00e9" * 70_000]
        assert agreement.gather(texts[place.index]) == texts
        assert agreement.gather("xy"[place.index]) == ["x", "y"]
        assert agreement.first(lambda: {"chosen": place.index}) == {"chosen": 0}
        def refuse():
            raise UserError(f"not in {place.index}")
        try:
            agreement.first(refuse)
        except UserError as error:
            print(error)
        if place.index == 1:
            group.leave()
        time.sleep(600)
    """
    with script(text, processes=2) as job:
        ended = job.wait()
    assert [each.code for each in ended] == [75, 75], ended
    assert ["not in 0" in each.out for each in ended] == [True, True]
    for each in ended:
        assert last_line(each).startswith(
            "error: the last collective over the devices of all 2 processes has not returned in process 1 within 2 s. "
        )


@pytest.mark.parametrize("late", [0, 1])
def test_a_process_that_connects_late_gets_the_reason(late):
    text = f"""
        time.sleep(0.5 * (place.index == {late}))
        group = Group(place)
        if place.index != {late}:
            error = UserError("no such file")
            group.fail(error, explain(error))
        time.sleep(600)
    """
    with script(text, processes=2) as job:
        ended = job.wait()
    assert [each.code for each in ended] == [2, 2]
    assert (
        ended[late].err == f"process {1 - late}: {ended[1 - late].err}" == f"process {1 - late}: error: no such file\n"
    )
