"""Give the measurements of a run to a tracker in another process, without waiting for it."""

import contextlib
import dataclasses
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from ...distributed import console
from .tracker import HAS_WARNED, TrackedRun, warning

_MOST_PENDING = 2**24  # bytes that a tracker may lag behind
LAST_SECONDS = {True: 60.0, False: 10.0}  # how long a run that is complete, or that has to stop, waits for a tracker


class Relay:
    """A tracker in a process of its own, which the first message starts.

    Messages are lines of JSON on its standard input. What the pipe does not take is kept and sent with later messages.
    A tracker that fails, hangs or lags behind is given up with one warning.

    Args:
      name: of the tracker, for warnings.
      section: the tracker as the section of a component.
      run: the run as trackers see it.
    """

    def __init__(self, name: str, section: Mapping[str, Any], run: TrackedRun):
        options = {key: value for key, value in section.items() if key != "name"}
        self._name, self._off = name, False
        self._process: subprocess.Popen[bytes] | None = None
        first = {"tracker": name, "name": section["name"], "options": options, "run": dataclasses.asdict(run)}
        self._pending = bytearray(json.dumps(first).encode() + b"\n")

    def send(self, **message: Any) -> None:
        """Send a message, without waiting."""
        if self._off:
            return
        self._pending += json.dumps(message).encode() + b"\n"
        try:
            self._process = self._process or _start()
            self._push(self._process)
        except OSError as error:
            self._give_up(f"{type(error).__name__}: {error}")
        if len(self._pending) > _MOST_PENDING:
            self._give_up(f"it lags {_MOST_PENDING >> 20} MiB behind")

    def close(self, complete: bool) -> None:
        """Wait for the tracker to finish, for a limited time. After a stopped run it may continue without the run."""
        if self._process is None or self._off:
            return
        deadline = time.monotonic() + LAST_SECONDS[complete]
        self.send(complete=complete)
        pipe = self._process.stdin
        assert pipe is not None
        try:
            while self._pending and time.monotonic() < deadline:
                select.select([], [pipe], [], 0.1)
                self._push(self._process)
            if not self._off:
                pipe.close()
                if self._process.wait(max(0.0, deadline - time.monotonic())):
                    self._give_up("it ended")
        except (OSError, subprocess.TimeoutExpired):
            if complete:
                self._give_up(f"not finished after {LAST_SECONDS[complete]:.0f} s")

    def _push(self, process: subprocess.Popen[bytes]) -> None:
        """Write what the pipe takes."""
        assert process.stdin is not None
        with contextlib.suppress(BlockingIOError):
            try:
                while self._pending:
                    del self._pending[: os.write(process.stdin.fileno(), self._pending[: 1 << 16])]
            except BrokenPipeError:
                self._give_up("it ended")

    def _give_up(self, why: str) -> None:
        if self._off:
            return
        self._off = True
        self._pending.clear()
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                if self._process.wait(1) == HAS_WARNED:
                    return
        console.say(warning(self._name, why))


def _start() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", __name__.rpartition(".")[0]],
        stdin=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # Ctrl-C is for the run, which tells its trackers
    )
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    return process
