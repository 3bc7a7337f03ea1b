"""Report when a process makes no progress, and where it is: the first thing to know of a job that hangs.

Each process watches itself. In a run of several, most stalled processes wait in a collective for another one; their
reports are side by side in the workdir, with the phase of each in its first line.
"""

import datetime
import faulthandler
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax

from ..base import workdir as layout

_LOOKING_SECONDS = 1.0  # between looks during a stall, so that its end is reported soon


class _Mark(NamedTuple):
    phase: str
    step: int  # steps taken before it
    since: float  # on the monotonic clock


class Watchdog:
    """While entered, a thread writes a line to stderr when no phase has begun for `seconds`.

    It repeats the line after twice, four times, ... as long, each time with the stacks of all threads in
    `stalls/process_N.txt` of the workdir, and reports when the process moves again.

    Args:
      workdir: workdir of the run.
      seconds: time without progress; 0 disables the watchdog.
    """

    def __init__(self, workdir: Path, seconds: float):
        self._path = workdir / layout.STALLS / f"process_{jax.process_index()}.txt"
        self._seconds = seconds
        self._mark: _Mark | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self):
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *exception):
        self._over.set()
        if self._seconds:
            self._thread.join(_LOOKING_SECONDS)  # it may hang in a write to the disk

    def at(self, phase: str, step: int) -> None:
        """Begin a phase after `step` steps. Takes less than a microsecond."""
        self._mark = _Mark(phase, step, time.monotonic())

    def _watch(self) -> None:
        stalled: _Mark | None = None
        due, pause = self._seconds, self._seconds
        while not self._over.wait(pause):
            mark, now = self._mark, time.monotonic()
            if stalled is not None and mark is not stalled:
                _say(f"moves again, after {now - stalled.since:.0f} s in {stalled.phase!r}")
                stalled, due = None, self._seconds
            still = now - mark.since if mark else 0.0
            if mark and still >= due:
                stalled, due = mark, 2 * due
                self._report(mark, still)
            pause = min(due - still, _LOOKING_SECONDS) if stalled else due - still

    def _report(self, mark: _Mark, still: float) -> None:
        line = f"no progress for {still:.0f} s in {mark.phase!r} after step {mark.step}"
        _say(f"{line}; stacks of all threads: {self._path}")  # before the write, which may hang too
        try:
            self._path.parent.mkdir(exist_ok=True)
            with self._path.open("w") as file:
                file.write(f"{datetime.datetime.now().isoformat(timespec='seconds')} {_process()}{line}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            _say(f"cannot write {self._path}: {error.strerror}")


def _process() -> str:
    return f"process {jax.process_index()}: " if jax.process_count() > 1 else ""


def _say(text: str) -> None:
    print(f"watchdog: {_process()}{text}", file=sys.stderr, flush=True)
