"""A run in which nothing moves says so, and where it stands: what a person needs to know of a job that hangs.

Each process watches itself. In a run of several, most of those that stand still wait in a collective for one that is
somewhere else; their reports lie side by side in the workdir, the phase of each in its first line.
"""

import contextlib
import datetime
import faulthandler
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from ..base import workdir as layout

_LOOKING_SECONDS = 1.0  # between looks while nothing moves, to say soon that it goes on


class Mark(NamedTuple):
    """What a process has begun, the steps behind it then, and when, in seconds of a monotonic clock."""

    phase: str
    step: int
    since: float


class Watchdog:
    """While entered, a thread that writes to stderr when no mark has been made for `seconds`.

    It says so again after twice, four times, ... as long, each time with the stacks of all threads in
    `stalls/process_N.txt` of the workdir, and once more when the process has moved on.

    Args:
      workdir: of the run.
      seconds: 0 never says anything.
    """

    def __init__(self, workdir: Path, seconds: float):
        self._path = workdir / layout.STALLS / f"process_{jax.process_index()}.txt"
        self._seconds = seconds
        self._mark: Mark | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self):
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *exception):
        self._over.set()
        if self._seconds:
            self._thread.join(_LOOKING_SECONDS)  # it may be writing to a disk that hangs

    def at(self, phase: str, step: int) -> None:
        """This process begins a phase, with so many steps behind it. Costs less than a microsecond."""
        self._mark = Mark(phase, step, time.monotonic())

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase within another."""
        outer = self._mark
        step = outer.step if outer else 0
        self.at(phase, step)
        try:
            yield
        finally:
            self.at(outer.phase if outer else phase, step)

    def _watch(self) -> None:
        stalled: Mark | None = None
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

    def _report(self, mark: Mark, still: float) -> None:
        line = f"nothing has moved for {still:.0f} s: {mark.phase!r}, after step {mark.step}"
        _say(f"{line}; where every thread is: {self._path}")  # before the disk, which may be what hangs
        try:
            self._path.parent.mkdir(exist_ok=True)
            with self._path.open("w") as file:
                file.write(f"{datetime.datetime.now().isoformat(timespec='seconds')} {_who()}{line}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            _say(f"{self._path} cannot be written: {error.strerror}")


def _who() -> str:
    return f"process {jax.process_index()}: " if jax.process_count() > 1 else ""


def _say(text: str) -> None:
    print(f"watchdog: {_who()}{text}", file=sys.stderr, flush=True)
