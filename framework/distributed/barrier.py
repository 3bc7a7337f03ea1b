"""Barriers for background threads, which one process can fail in all others at once."""

import itertools
import time
from typing import Any

import jax
from jax._src import distributed  # JAX's key-value store has no public interface

_FOLDER = "shampax/barriers"
_ALL = "all"


class Barriers:
    """The barriers of tasks that the processes of a run work on together, one task after the other.

    All processes make the same calls, except that one which fails calls `fail` instead of the next `wait`. No
    collective runs, so threads may wait during train steps.
    """

    _numbers = itertools.count(1)

    def __init__(self):
        self._task = self._stage = 0

    def begin(self) -> None:
        """Begin a task. All processes have finished the previous one."""
        if self._task and jax.process_index() == 0:
            _store().key_value_delete(f"{_FOLDER}/{self._task}/")
        self._task, self._stage = next(self._numbers), 0

    def wait(self, seconds: float) -> None:
        """Wait until all processes have come.

        Raises:
          OSError: a process has failed; the message names it.
          jax.errors.JaxRuntimeError: a process has not come in time.
        """
        end, me, reason = time.monotonic() + seconds, jax.process_index(), ""
        if me:
            self._tell(me, "")
            reason = self._told(_ALL, end)
        else:
            for index in range(1, jax.process_count()):
                reason = reason or self._told(index, end)
            self._tell(_ALL, reason)
        self._stage += 1
        if reason:
            raise OSError(reason)

    def fail(self, reason: str) -> None:
        """Let the next barrier fail in all other processes."""
        me = jax.process_index()
        self._tell(me or _ALL, f"process {me}: {reason}")

    def _tell(self, who: Any, reason: str) -> None:
        _store().key_value_set(self._key(who), reason, allow_overwrite=True)

    def _told(self, who: Any, end: float) -> str:
        milliseconds = max(1, round(1000 * (end - time.monotonic())))
        return _store().blocking_key_value_get(self._key(who), milliseconds)

    def _key(self, who: Any) -> str:
        return f"{_FOLDER}/{self._task}/{self._stage}/{who}"


def _store() -> Any:
    return distributed.global_state.client
