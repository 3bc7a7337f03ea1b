"""Stop a run after the current step when a signal arrives."""

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
    """Note the first SIGINT or SIGTERM inside the `with` block instead of exiting; a second SIGINT aborts.

    A signal that was ignored before stays ignored. In a run of several processes, JAX handles SIGTERM itself and lets
    all processes stop after the same step. SIGINT is passed on as SIGTERM there, and all processes report its name.
    """

    def __init__(self):
        self._alone = not jax.distributed.is_initialized()
        self._received: str | None = None
        self._asked = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self):
        # Only the main thread may handle signals; in another thread the caller must do so.
        if threading.current_thread() is threading.main_thread():
            handled = _SIGNALS if self._alone else (signal.SIGINT,)
            kept = [number for number in handled if signal.getsignal(number) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._receive) for number in kept}
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def reason(self) -> str | None:
        """Return the name of the signal to stop for, if any, the same on all processes.

        Every process calls it equally often: after every step, and between held-out batches.
        """
        if self._alone:
            return self._received
        self._asked += 1
        if not multihost_utils.reached_preemption_sync_point(self._asked):
            return None
        received = agreement.gather(self._received or "")
        return signal.SIGINT.name if signal.SIGINT.name in received else signal.SIGTERM.name

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name
        # print is not safe in a handler, which may have interrupted another print.
        os.write(2, f"\n{self._received}: saving after this step; press Ctrl-C again to abort\n".encode())
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)
