"""Ends before the end: signals that ask a run to stop after the step it is in, and runs that cannot go on."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingStopped(Exception):
    """Training cannot usefully go on. The message says why and what to change; a checkpoint is saved."""


class StopSignals:
    """While entered, the first SIGINT or SIGTERM is remembered instead of ending the process; a second SIGINT
    aborts.

    In a run of several processes JAX itself listens for SIGTERM, and all processes stop after the same step;
    SIGINT keeps its usual meaning there.
    """

    def __init__(self):
        self._received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self):
        # Python lets only the main thread handle signals; elsewhere the caller must see to them.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def reason(self, step: int) -> str | None:
        """The name of the signal to stop for after this step, if any. Every process asks after every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            return signal.SIGTERM.name
        return self._received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name
        # print is not safe inside a handler: it may have interrupted another print.
        os.write(2, f"\n{self._received}: saving after this step; press Ctrl-C again to abort\n".encode())
