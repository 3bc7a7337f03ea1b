"""Daemon threads for LAPACK, which do not delay the end of the process."""

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
    """A pool of daemon threads with a first-in, first-out queue.

    The interpreter joins the threads of the standard library's executor at exit, and would hang on an endless solve.

    Args:
      count: number of threads.
      name: prefix of the threads' names.
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
        """Call `function(*arguments)` in one of the threads; return a future."""
        future: Future[Any] = Future()
        self._tasks.put(_Task(future, function, arguments))
        return future

    def close(self) -> None:
        """Cancel all waiting tasks. Returns at once."""
        self._closed = True
        for _ in range(self.count):
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._closed:
                task.future.cancel()
            if not task.future.set_running_or_notify_cancel():
                continue
            start = time.perf_counter()
            try:
                task.future.set_result(task.function(*task.arguments))
            except BaseException as error:  # the future raises it
                task.future.set_exception(error)
            with self._lock:
                self.busy_seconds += time.perf_counter() - start
            del task  # free its large arguments while waiting for the next task


def pool_size(asked: int) -> int:
    """Return the number of solver threads; for 0, one fewer than the cores, which leaves one to dispatch steps."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or max(1, cores - 1)
