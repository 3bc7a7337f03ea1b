"""Threads for LAPACK that a process can end without waiting for."""

import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple


class _Task(NamedTuple):
    future: Future[Any]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Workers:
    """Daemon threads that take tasks first come, first served.

    The executor of the standard library joins its threads when the interpreter ends, and with them a solve that never
    does; nobody waits for these.

    Args:
      count: number of threads.
      name: of the threads, for debuggers and timelines.
    """

    def __init__(self, count: int, name: str):
        self.count = count
        self.busy_seconds = 0.0
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        for number in range(count):
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True).start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call `function(*arguments)` in one of the threads; the future has what it returns or raises."""
        future: Future[Any] = Future()
        self._tasks.put(_Task(future, function, arguments))
        return future

    def close(self) -> None:
        """Begin no further task; those that wait are cancelled. Returns at once."""
        self._closed = True
        for _ in range(self.count):
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._closed:
                task.future.cancel()
                continue
            task.future.set_running_or_notify_cancel()
            start = time.perf_counter()
            try:
                task.future.set_result(task.function(*task.arguments))
            except BaseException as error:  # whoever waits for the result raises it
                task.future.set_exception(error)
            with self._lock:
                self.busy_seconds += time.perf_counter() - start
            del task  # its arguments are large, and the next may be long in coming


def pool_size(asked: int) -> int:
    """Number of threads that solve where `asked` are wanted; 0 leaves one core to the thread that dispatches steps."""
    return asked or max(1, available_cores() - 1)


def available_cores() -> int:
    """Cores that this process may use; a batch system may give it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
