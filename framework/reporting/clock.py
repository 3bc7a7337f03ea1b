"""Time spent on training alone, and time since the process started."""

import os
import time
from pathlib import Path

_IMPORTED = time.monotonic()


class Clock:
    """A stopwatch for training: runs while entered, stands still while the run compiles, evaluates, saves."""

    def __init__(self, seconds: float):
        """`seconds`: what earlier processes of this run have spent."""
        self._before = seconds
        self._started: float | None = None

    def __enter__(self):
        """Go on counting."""
        self._started = time.monotonic()
        return self

    def __exit__(self, *exception):
        """Stand still."""
        self._before, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        """Training seconds so far."""
        return self._before + (time.monotonic() - self._started if self._started is not None else 0.0)


def seconds_since_process_start() -> float:
    """Age of this process; where the system does not tell, time since this module was imported."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.monotonic() - _IMPORTED
    # Field 22, in clock ticks since boot; the name in field 2 may hold spaces but ends with the last bracket.
    started = int(stat.read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
