"""Processes of this machine that start together and end together, and whose output is one log.

No process outlives this one, however it ends: Linux kills the children of a process that is gone. Each has a session of
its own, so that a Ctrl-C of the terminal reaches it once, from here, and what it has started itself ends with it.
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
_OTHER_FAILED = 75  # what a process of a run says when another has failed
_SETTLING_SECONDS = 1.0  # for failures that have one cause; the processes of a run end each other meanwhile
_OUTPUT_SECONDS = 5.0  # for the last lines of processes that have ended
_PR_SET_PDEATHSIG = 1
_COLOURS = (36, 33, 35, 32, 34, 31, 96, 93, 95, 92, 94, 91)  # of terminals; those that can be read on black and white

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class Failure(NamedTuple):
    """The first process that has failed: its index, and its code as a shell has it, 128 + N for signal N."""

    index: int
    code: int

    def __str__(self):
        number = self.code - 128
        name = f", {signal.Signals(number).name}" if number in set(signal.Signals) else ""
        return f"process {self.index} has ended with code {self.code}{name}"


class Gang:
    """Starts processes, any number of times, and passes on the signals that this one gets while the block is entered.

    The first SIGINT, SIGTERM or SIGHUP (as a SIGTERM) goes to all processes, once, and they have all the time they
    want. Another one goes to all again, and whoever is still there after the grace is killed.

    Args:
      command: of all.
      grace_seconds: for processes that are asked to end because another has failed.
    """

    def __init__(self, command: Sequence[str], *, grace_seconds: float):
        self._command, self._grace = command, grace_seconds
        self.asked: signal.Signals | None = None  # the signal by which all were asked to end
        self._processes: list[subprocess.Popen[bytes]] = []
        self._complete = False  # all have been started
        self._pending: int | None = None  # a signal that came before that
        # Codes by index as they end; None: somebody is impatient.
        self._ends: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._handlers: dict[int, Any] = {}

    def __enter__(self):
        self._handlers = {number: signal.signal(number, self._pass_on) for number in _SIGNALS}
        return self

    def __exit__(self, *exception):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def run(self, environments: Sequence[Mapping[str, str]]) -> Failure | None:
        """Start a process in each environment and wait until all have ended; None where none has failed.

        In the main thread only: that is whose end Linux kills the children at.
        """
        if self.asked:
            return Failure(0, 128 + self.asked)
        self._ends = queue.SimpleQueue()
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
                    relays.append(_in_background(_relay, source, target, _coloured(label, index, target)))
                _in_background(_await, process, index, self._ends)
            # In this order a signal is neither lost nor passed on twice, whenever it comes.
            self._complete = True
            if self._pending is not None:
                self._send(self._pending)
            return self._wait()
        finally:
            self._complete = False
            for process in self._processes:
                if process.poll() is None:
                    _signal_session(process.pid, signal.SIGKILL)
                    process.wait()
            self._processes = []
            for relay in relays:
                relay.join(_OUTPUT_SECONDS)

    def _wait(self) -> Failure | None:
        running = set(range(len(self._processes)))
        failures: list[Failure] = []
        # When the next thing is due: the others are asked to end, then they are killed.
        deadline, ask = None, True
        while running:
            try:
                end = self._ends.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                if ask and not self.asked:
                    self._send(signal.SIGTERM)
                elif not ask:
                    for index in running:
                        _signal_session(self._processes[index].pid, signal.SIGKILL)
                deadline, ask = (time.monotonic() + self._grace if ask else None), False
                continue
            if end is None:
                deadline, ask = time.monotonic() + self._grace, False
                continue
            index, code = end
            running.discard(index)
            if code:
                if deadline is None and ask:
                    deadline = time.monotonic() + _SETTLING_SECONDS
                if ask or not failures:
                    failures.append(Failure(index, code if code > 0 else 128 - code))
        return next((failure for failure in failures if failure.code != _OTHER_FAILED), None) or next(
            iter(failures), None
        )

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        del frame
        again, self.asked = self.asked is not None, signal.Signals(number)
        number = signal.SIGTERM if number == signal.SIGHUP else number
        if self._complete:
            self._send(number)
        else:
            self._pending = number
        if again:
            self._ends.put(None)

    def _send(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)  # unless it has ended


def _die_with(parent: int):
    def ask_linux() -> None:
        assert _libc is not None
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before
            os._exit(128 + signal.SIGKILL)

    return ask_linux


def _await(process: subprocess.Popen[bytes], index: int, ends: queue.SimpleQueue) -> None:
    # Before its number is free for another process, what it has left behind in its session is ended.
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    _signal_session(process.pid, signal.SIGKILL)
    ends.put((index, process.wait()))


def _signal_session(leader: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


_output = threading.Lock()


def _relay(source: IO[bytes], target: Any, label: str) -> None:
    """Copy whole lines, each with a label, until there are no more; where nobody reads them, into nothing."""
    with source:
        for line in source:
            text = f"{label} {line.decode(errors='replace').rstrip()}\n"
            with _output, contextlib.suppress(OSError, ValueError):
                target.write(text)
                target.flush()


def _coloured(label: str, index: int, target: Any) -> str:
    """With colour on a terminal that has some and whose user wants it, https://no-color.org."""
    if not target.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return label
    return f"\033[{_COLOURS[index % len(_COLOURS)]}m{label}\033[0m"


def _in_background(work: Any, *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread
