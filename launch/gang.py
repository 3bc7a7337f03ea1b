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
from collections.abc import Mapping, Sequence
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


def run(command: Sequence[str], environments: Sequence[Mapping[str, str]], *, grace_seconds: float) -> Failure | None:
    """Run a command in each environment, wait until all processes have ended, and return the first failure.

    SIGINT, SIGTERM and SIGHUP (as SIGTERM) are passed on to all processes, which may then take any time to end. A
    signal that was ignored before stays ignored, as SIGHUP under nohup.

    Call it from the main thread: Linux kills children when the thread that started them exits.

    Args:
      command: command of every process.
      environments: environment of each process.
      grace_seconds: time from SIGTERM to SIGKILL after another process has failed.
    """
    processes: dict[int, subprocess.Popen[bytes]] = {}  # those that have not ended
    relays, asked = [], threading.Event()

    def send(number: int) -> None:
        for process in processes.values():
            process.send_signal(number)

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        asked.set()
        send(signal.SIGTERM if number == signal.SIGHUP else number)

    try:
        for index, environment in enumerate(environments):
            process = processes[index] = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            label = f"[{index:>{len(str(len(environments) - 1))}}]"
            for streams in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                relays.append(threading.Thread(target=_relay, args=(*streams, label), daemon=True))
                relays[-1].start()
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, pass_on)
        failures, settled_at, kill_at = [], math.inf, math.inf
        while processes:
            for index, process in list(processes.items()):
                if (code := process.poll()) is None:
                    continue
                _kill_session(processes.pop(index))
                if code and (not failures or kill_at == math.inf):  # later codes are those of SIGTERM
                    failures.append(Failure(index, code if code > 0 else 128 - code))
            now = time.monotonic()
            if failures and not asked.is_set():
                settled_at = min(settled_at, now + _SETTLING_SECONDS)
                if now >= settled_at and kill_at == math.inf:
                    kill_at = now + grace_seconds
                    send(signal.SIGTERM)
            if now >= kill_at:
                send(signal.SIGKILL)
            time.sleep(_LOOKING_SECONDS)
        return next((failure for failure in failures if failure.code != _OTHER_FAILED), (*failures, None)[0])
    finally:
        for process in processes.values():
            _kill_session(process)
        for relay in relays:
            relay.join(_OUTPUT_SECONDS)


def die_with_parent() -> None:
    """Let Linux kill this process when the thread that started it exits."""
    if _libc:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill_session(leader: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader.pid, signal.SIGKILL)


def _relay(source: IO[bytes], target: Any, label: str) -> None:
    """Copy lines, each with the label; drop them if the target is closed."""
    with source:
        for line in source:
            text = f"{label} {line.decode(errors='replace').rstrip()}\n"
            with _output, contextlib.suppress(OSError, ValueError):
                target.write(text)
                target.flush()
