"""Report when a process makes no progress, and where it is: the first thing to know of a job that hangs. Then end it.

Each process watches itself. In a run of several, most stalled processes wait in a collective for another one; their
reports are side by side in the workdir, with the phase of each in its first line.
"""

import datetime
import faulthandler
import math
import sys
import tempfile
import threading
import time
from typing import NamedTuple

import jax

from ..base import paths
from ..base import workdir as layout
from ..base.errors import told
from ..base.paths import Path
from ..distributed import processes

_LOOKING_SECONDS = 1.0  # between looks, at most
_STOPPED_SECONDS = 10.0  # longer than a busy machine delays a thread
_REPORTING_SECONDS = 5.0  # a report can hang itself, in a write to the disk


class _Mark(NamedTuple):
    phase: str
    step: int  # steps taken before it
    since: float  # on the monotonic clock


class Watchdog:
    """While entered, a thread writes a line to stderr when no phase has begun for `report_after` seconds.

    It repeats the line after twice, four times, ... as long, each time with the stacks of all threads in
    `stalls/process_N.txt` of the workdir, and reports when the process moves again. After `end_after` seconds it ends
    this process, and with it all others of the run, with exit code 75.

    Args:
      workdir: workdir of the run.
      report_after, end_after: seconds without progress; 0 means never.
    """

    def __init__(self, workdir: Path, report_after: float, end_after: float):
        self._path = workdir / layout.STALLS / f"process_{jax.process_index()}.txt"
        self._report_after, self._end_after = report_after or math.inf, end_after or math.inf
        self._pause = max(0.01, min(_LOOKING_SECONDS, self._report_after / 10, self._end_after / 10))
        self._mark: _Mark | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._over.set()
        self._thread.join(_LOOKING_SECONDS)

    def at(self, phase: str, step: int) -> None:
        """Begin a phase after `step` steps. Takes less than a microsecond."""
        self._mark = _Mark(phase, step, time.monotonic())

    def _watch(self) -> None:
        stalled: _Mark | None = None
        due, woken, asleep = self._report_after, 0.0, time.monotonic()
        while not self._over.wait(self._pause):
            mark, now = self._mark, time.monotonic()
            if now - asleep > _STOPPED_SECONDS:
                woken = now  # the whole process was stopped, as by Ctrl-Z
            if stalled is not None and mark is not stalled:
                _say(f"moves again, after {now - stalled.since:.0f} s in {stalled.phase!r}")
                stalled, due = None, self._report_after
            still = now - max(mark.since, woken) if mark else 0.0
            if mark and still >= min(due, self._end_after):
                stalled, due = mark, 2 * due
                line = f"no progress for {still:.0f} s in {mark.phase!r} after step {mark.step}"
                report = threading.Thread(target=self._report, args=(line,), daemon=True)
                report.start()
                report.join(_REPORTING_SECONDS)
                if still >= self._end_after and not self._over.is_set():
                    limit = f"config.watchdog.end_after={self._end_after:g}"
                    line = f"error: {_process()}{line} ({limit}). See {self._path}, then {processes.RESUME}."
                    processes.end_run(processes.TRY_AGAIN, line)
            asleep = time.monotonic()

    def _report(self, line: str) -> None:
        _say(f"{line}; stacks of all threads: {self._path}")  # before the write, which may hang too
        try:
            with tempfile.TemporaryFile("w+") as file:  # faulthandler writes to files of the system only
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                stacks = file.read()
            now = datetime.datetime.now().isoformat(timespec="seconds")
            self._path.parent.mkdir(exist_ok=True)
            self._path.write_text(f"{now} {_process()}{line}\n\n{stacks}")
        except paths.errors() as error:
            _say(f"cannot write {self._path}: {told(error)}")


def _process() -> str:
    return f"process {jax.process_index()}: " if jax.process_count() > 1 else ""


def _say(text: str) -> None:
    print(f"watchdog: {_process()}{text}", file=sys.stderr, flush=True)
