import time

import pytest

from shampax.framework.distributed import processes
from shampax.framework.reporting import watchdog
from shampax.framework.reporting.watchdog import Watchdog


def stands_still(seconds):
    time.sleep(seconds)


def test_a_stall_is_reported_at_growing_intervals_with_stacks_and_its_end(tmp_path, capsys):
    """Faults: a line every second; the wrong phase or step; the end is not reported; a report without the caller."""
    with Watchdog(tmp_path, 0.2, 0) as watch:
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
def test_no_report_while_steps_finish_or_if_turned_off(seconds, tmp_path, capsys):
    """Faults: time is measured from the start; a phase that has not begun counts as stalled; 0 means at once."""
    with Watchdog(tmp_path, seconds, 0) as watch:
        stands_still(0.7)
        for step in range(20):
            watch.at("step", step)
            stands_still(0.04)
        if not seconds:
            stands_still(0.3)
    assert capsys.readouterr().err == ""
    assert not any(tmp_path.iterdir())


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    """Fault: a full disk ends the thread with a traceback."""
    (tmp_path / "stalls").write_text("in the way")
    with Watchdog(tmp_path, 0.1, 0) as watch:
        watch.at("checkpoint", 1)
        stands_still(0.15)
    err = capsys.readouterr().err
    assert "'checkpoint'" in err and "cannot write" in err and "Traceback" not in err


@pytest.mark.parametrize("broken", [False, True])
def test_a_process_that_hangs_is_ended_with_75(broken, tmp_path, capsys, monkeypatch):
    """Faults: a hang in a collective costs days; a report that hangs in a write to the disk keeps the process alive."""
    ended = []
    monkeypatch.setattr(processes, "end_run", lambda *arguments: ended.append(arguments))
    monkeypatch.setattr(watchdog, "_REPORTING_SECONDS", 0.1)
    if broken:
        monkeypatch.setattr(Watchdog, "_report", lambda self, line: time.sleep(60))
    with Watchdog(tmp_path, 0, 0.3) as watch:
        watch.at("step", 8)
        stands_still(0.25)
        assert ended == []
        stands_still(0.5)
    code, line = ended[0]
    assert code == 75
    assert line.startswith("error: no progress for 0 s in 'step' after step 8 (config.watchdog.end_after=0.3). See ")
    assert line.endswith("then rerun the same command to resume from the latest checkpoint.")
    assert broken or "in stands_still" in (tmp_path / "stalls" / "process_0.txt").read_text()


def test_a_process_that_was_stopped_has_not_hung(tmp_path, capsys, monkeypatch):
    """Fault: a run that was stopped for an hour, as by Ctrl-Z, is ended when it continues."""
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock())
    with Watchdog(tmp_path, 5, 50) as watch:
        watch.at("step", 8)
        stands_still(0.1)
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 100)
        stands_still(0.8)
    assert capsys.readouterr().err == ""
