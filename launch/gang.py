"""Start processes of this machine together, end them together, and label their output.

No process outlives this one: Linux kills the children of a dead process. Each process leads a session of its own, so
that Ctrl-C in a terminal reaches it once, through this process, and the processes that it starts end with it.
"""

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO, Any, NamedTuple

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_OTHER_FAILED = 75  # exit code of a process that ends because another process of the run has failed
_SETTLING_SECONDS = 1.0  # processes that fail for one reason also end each other; collect their codes meanwhile
_OUTPUT_SECONDS = 5.0  # for the last lines of ended processes
_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


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
    one is sent too, and processes that have not ended after the grace are killed.

    Args:
      command: command of every process.
      grace_seconds: time from SIGTERM to SIGKILL after another process has failed.
    """

    def __init__(self, command: Sequence[str], *, grace_seconds: float):
        self._command, self._grace = command, grace_seconds
        self.asked: signal.Signals | None = None  # the latest signal received
        self._processes: list[subprocess.Popen[bytes]] = []
        # (index, exit code) of ended processes; (None, signal) of received signals.
        self._events: queue.SimpleQueue[tuple[int | None, int]] = queue.SimpleQueue()
        self._handlers: dict[int, Any] = {}

    def __enter__(self):
        self._handlers = {number: signal.signal(number, self._receive) for number in _SIGNALS}
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
                process = subprocess.Popen(
                    self._command,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                    preexec_fn=_die_with(os.getpid()) if _libc else None,
                )
                self._processes.append(process)
                label = f"[{index:>{len(str(len(environments) - 1))}}]"
                for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                    relays.append(_in_background(_relay, source, target, label))
                _in_background(self._report_end, index, process)
            return self._wait()
        finally:
            for process in self._processes:
                if process.poll() is None:
                    _kill_session(process.pid)
                    process.wait()
            self._processes = []
            for relay in relays:
                relay.join(_OUTPUT_SECONDS)

    def _wait(self) -> Failure | None:
        running, failures, signals = set(range(len(self._processes))), [], 0
        deadline, killing = None, False  # at the deadline, ask the running processes to end or kill them
        while running:
            try:
                index, code = self._events.get(timeout=deadline and max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                if killing:
                    for each in running:
                        _kill_session(self._processes[each].pid)
                elif not self.asked:
                    self._send(signal.SIGTERM)
                deadline, killing = None if killing else time.monotonic() + self._grace, True
                continue
            if index is None:
                self._send(code)
                signals += 1
                if signals > 1:
                    deadline, killing = time.monotonic() + self._grace, True
                continue
            running.discard(index)
            if code and (not killing or not failures):
                failures.append(Failure(index, code if code > 0 else 128 - code))
                deadline = deadline or time.monotonic() + _SETTLING_SECONDS
        causes = [failure for failure in failures if failure.code != _OTHER_FAILED]
        return next(iter(causes + failures), None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.asked = signal.Signals(number)
        self._events.put((None, signal.SIGTERM if number == signal.SIGHUP else number))

    def _send(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)  # ignored if it has ended

    def _report_end(self, index: int, process: subprocess.Popen[bytes]) -> None:
        # Kill the rest of the session while the process is a zombie, so that its number is not reused.
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        _kill_session(process.pid)
        self._events.put((index, process.wait()))


def _die_with(parent: int):
    def ask_linux() -> None:
        assert _libc is not None
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent has died before the call
            os._exit(128 + signal.SIGKILL)

    return ask_linux


def _kill_session(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


_output = threading.Lock()


def _relay(source: IO[bytes], target: Any, label: str) -> None:
    """Copy lines, each with the label; drop them if the target is closed."""
    with source:
        for line in source:
            text = f"{label} {line.decode(errors='replace').rstrip()}\n"
            with _output, contextlib.suppress(OSError, ValueError):
                target.write(text)
                target.flush()


def _in_background(work: Any, *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread
