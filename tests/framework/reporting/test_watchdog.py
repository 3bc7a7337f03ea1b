import contextlib
import time

import pytest

from shampax.framework.reporting.watchdog import Watchdog


def stands_still(seconds):
    time.sleep(seconds)


def test_a_stall_is_named_at_growing_pauses_with_stacks_and_its_end(tmp_path, capsys):
    """Faults: a line every second; the wrong phase or step; no word when it goes on; a report without the caller."""
    with Watchdog(tmp_path, 0.2) as watch:
        watch.at("data", 7)
        watch.at("step", 8)
        stands_still(1.2)
        watch.at("data", 8)
        stands_still(1.2)
    lines = capsys.readouterr().err.splitlines()
    first = [line for line in lines if "'step' after step 8" in line]
    assert len(first) == 3  # after 0.2, 0.4 and 0.8 s
    assert all(line.startswith("watchdog: no progress for ") for line in first)
    assert lines[3].startswith("watchdog: moves again, after ") and lines[3].endswith("'step'")
    assert "'data' after step 8" in lines[4]
    report = (tmp_path / "stalls" / "process_0.txt").read_text()
    assert "'data' after step 8" in report.splitlines()[0]
    assert "in stands_still" in report


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_nothing_is_said_while_something_moves_or_of_a_dog_that_is_off(seconds, tmp_path, capsys):
    """Faults: time is counted from the start; what has not begun yet stalls; 0 is at once."""
    with Watchdog(tmp_path, seconds) as watch:
        stands_still(0.7)
        for step in range(20):
            watch.at("step", step)
            stands_still(0.04)
        if not seconds:
            stands_still(0.3)
    assert capsys.readouterr().err == ""
    assert not any(tmp_path.iterdir())


def test_a_phase_within_another_gives_way_to_it_again(tmp_path, capsys):
    """Fault: a compilation in an evaluation is taken for the evaluation, or all that follows for compiling."""
    with Watchdog(tmp_path, 0.2) as watch:
        watch.at("evaluation", 3)
        with contextlib.suppress(ZeroDivisionError), watch.during("compiling"):
            stands_still(0.35)
            print(1 / 0)
        stands_still(0.35)
    said = [line for line in capsys.readouterr().err.splitlines() if "no progress" in line]
    assert ["compiling" in said[0], "evaluation" in said[1]] == [True, True]


def test_a_report_that_cannot_be_written_costs_no_run(tmp_path, capsys):
    """Fault: a full disk ends the thread with a traceback."""
    (tmp_path / "stalls").write_text("in the way")
    with Watchdog(tmp_path, 0.1) as watch:
        watch.at("checkpoint", 1)
        stands_still(0.15)
    err = capsys.readouterr().err
    assert "'checkpoint'" in err and "cannot write" in err and "Traceback" not in err
