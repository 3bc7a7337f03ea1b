"""Start processes of this machine together, end them together, and label their output.

No process outlives this one: Linux kills the children of a dead process. Each process leads a session of its own, so
that Ctrl-C in a terminal reaches it once, through this process, and the processes that it starts end with it.
"""

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import IO, Any, NamedTuple

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_OTHER_FAILED = 75  # exit code of a process that ends because another process of the run has failed
_SETTLING_SECONDS = 1.0  # processes that fail for one reason also end each other; collect their codes meanwhile
_OUTPUT_SECONDS = 5.0  # for the last lines of ended processes
_LOOKING_SECONDS = 0.02
_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_output = threading.Lock()


class Failure(NamedTuple):
    """The first process that failed: its index, and its exit code as a shell has it, 128 + N for signal N."""

    index: int
    code: int

    def __str__(self):
        number = self.code - 128
        name = f", {signal.Signals(number).name}" if number in set(signal.Signals) else ""
        return f"process {self.index} has ended with code {self.code}{name}"


class Gang:
    """Run processes, any number of times, and pass on signals that arrive inside the `with` block.

    The first SIGINT, SIGTERM or SIGHUP (as SIGTERM) is sent to all processes, which may take any time to end. A second
    one is sent too, and processes that have not ended after the grace are killed. A signal that was ignored before
    stays ignored, as SIGHUP under nohup.

    Args:
      command: command of every process.
      grace_seconds: time from SIGTERM to SIGKILL after another process has failed.
    """

    def __init__(self, command: Sequence[str], *, grace_seconds: float):
        self._command, self._grace = command, grace_seconds
        self._processes: dict[int, subprocess.Popen[bytes]] = {}  # those that have not ended
        self._received: list[signal.Signals] = []
        self._handlers: dict[int, Any] = {}

    @property
    def asked(self) -> signal.Signals | None:
        """The latest signal received."""
        return self._received[-1] if self._received else None

    def __enter__(self):
        heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._receive) for number in heeded}
        return self

    def __exit__(self, *exception):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def run(self, environments: Sequence[Mapping[str, str]]) -> Failure | None:
        """Start a process in each environment, wait until all have ended, and return the first failure.

        Call it from the main thread: Linux kills children when the thread that started them exits.
        """
        if self.asked:
            return Failure(0, 128 + self.asked)
        relays = []
        try:
            for index, environment in enumerate(environments):
                process = self._processes[index] = subprocess.Popen(
                    self._command,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                    preexec_fn=_die_with(os.getpid()) if _libc else None,
                )
                label = f"[{index:>{len(str(len(environments) - 1))}}]"
                for streams in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                    relays.append(threading.Thread(target=_relay, args=(*streams, label), daemon=True))
                    relays[-1].start()
            return self._wait()
        finally:
            while self._processes:
                _end_session(self._processes.popitem()[1])
            for relay in relays:
                relay.join(_OUTPUT_SECONDS)

    def _wait(self) -> Failure | None:
        failures, passed_on = [], 0
        settled_at = kill_at = math.inf
        while self._processes:
            for index, process in list(self._processes.items()):
                if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                    continue
                code = _end_session(self._processes.pop(index))
                if code and (not failures or kill_at == math.inf):  # later codes are those of SIGTERM
                    failures.append(Failure(index, code if code > 0 else 128 - code))
            now = time.monotonic()
            if failures:
                settled_at = min(settled_at, now + _SETTLING_SECONDS)
            if now >= settled_at and kill_at == math.inf:
                kill_at = now + self._grace
                if not self.asked:
                    self._send(signal.SIGTERM)
            for number in self._received[passed_on:]:
                self._send(signal.SIGTERM if number == signal.SIGHUP else number)
                passed_on += 1
            if passed_on > 1:
                kill_at = min(kill_at, now + self._grace)
            if now >= kill_at:
                self._send(signal.SIGKILL)
            time.sleep(_LOOKING_SECONDS)
        causes = [failure for failure in failures if failure.code != _OTHER_FAILED]
        return next(iter(causes + failures), None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._received.append(signal.Signals(number))

    def _send(self, number: int) -> None:
        for process in self._processes.values():
            os.kill(process.pid, number)  # Popen.send_signal would collect a process that has ended


def _die_with(parent: int) -> Callable[[], None]:
    """Return a function for a new process: it is killed when its parent dies."""

    def prepare() -> None:
        assert _libc is not None
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call above
            os.kill(os.getpid(), signal.SIGKILL)

    return prepare


def _end_session(leader: subprocess.Popen[bytes]) -> int:
    """Kill a process that has not been waited for and those that it started; return its exit code."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader.pid, signal.SIGKILL)
    return leader.wait()


def _relay(source: IO[bytes], target: Any, label: str) -> None:
    """Copy lines, each with the label; drop them if the target is closed."""
    with source:
        for line in source:
            text = f"{label} {line.decode(errors='replace').rstrip()}\n"
            with _output, contextlib.suppress(OSError, ValueError):
                target.write(text)
                target.flush()
