"""Measure training time, and the time since the process started."""

import os
import time
from pathlib import Path

_IMPORTED = time.monotonic()


class Clock:
    """A stopwatch that runs while entered: during training, but not during compilation, evaluation or saving."""

    def __init__(self, seconds: float):
        """Start from the `seconds` of earlier processes of the run."""
        self._before = seconds
        self._started: float | None = None

    def __enter__(self):
        self._started = time.monotonic()
        return self

    def __exit__(self, *exception):
        self._before, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        """Training seconds so far."""
        return self._before + (time.monotonic() - self._started if self._started is not None else 0.0)


def seconds_since_process_start() -> float:
    """Return the age of this process, or the time since this module was imported where the system does not tell."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.monotonic() - _IMPORTED
    # Field 22, in clock ticks since boot. The name in field 2 may hold spaces but ends with the last bracket.
    started = int(stat.read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
