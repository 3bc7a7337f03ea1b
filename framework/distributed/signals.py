"""Signals that ask a run to stop after the step it is in."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from . import agreement

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, the first SIGINT or SIGTERM is remembered instead of ending the process; a second SIGINT
    aborts.

    Where JAX has started with the processes of a run, it listens for SIGTERM itself, from its start on, and lets all of
    them stop after the same step. A SIGINT becomes a SIGTERM there, and its name is what all of them report.
    """

    def __init__(self):
        self._alone = not jax.distributed.is_initialized()
        self._received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self):
        # Python lets only the main thread handle signals; elsewhere the caller must see to them.
        if threading.current_thread() is threading.main_thread():
            handled = _SIGNALS if self._alone else (signal.SIGINT,)
            self._previous = {number: signal.signal(number, self._receive) for number in handled}
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def reason(self, step: int) -> str | None:
        """The name of the signal to stop for after this step, if any: in all processes the same.

        Every process asks after every step.
        """
        if self._alone:
            return self._received
        if not multihost_utils.reached_preemption_sync_point(step):
            return None
        received = agreement.gather(self._received or "")
        return signal.SIGINT.name if signal.SIGINT.name in received else signal.SIGTERM.name

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name
        # print is not safe inside a handler: it may have interrupted another print.
        os.write(2, f"\n{self._received}: saving after this step; press Ctrl-C again to abort\n".encode())
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)
