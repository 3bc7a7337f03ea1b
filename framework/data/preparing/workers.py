"""Worker processes that end together: when one fails, or when their parent is killed."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from ...base.errors import UserError
from ...base.paths import Path

_NICE = 10  # in the background, after what trains


def run_in_processes(
    work: Callable[..., None], jobs: Sequence[tuple[Any, ...]], folder: Path, until: Connection | None = None
) -> bool:
    """Run `work(*job)` for each job, which fill a folder, in processes of their own; return whether all have finished.

    With `until`, they run in the background, ignore the signals that end the run, and are killed when something can be
    received from it.

    Raises:
      UserError, OSError: one of them failed; the others are terminated.
    """
    context: Any = multiprocessing.get_context("spawn")  # a fork of a process that has started JAX may hang
    errors = context.SimpleQueue()
    background = until is not None
    processes = [context.Process(target=_child, args=(errors, work, job, background), daemon=True) for job in jobs]
    try:
        for process in processes:
            process.start()
        running = {process.sentinel: process for process in processes}
        while running:
            ready = multiprocessing.connection.wait([*running, *([until] if until else [])])
            if until in ready:
                return False
            for sentinel in ready:
                process = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    died = (
                        f"{folder}: a worker that prepares it died with exit code {process.exitcode}, perhaps for lack "
                        "of memory. Use fewer workers and rerun the command; it continues with the missing shards."
                    )
                    raise UserError(died) if errors.empty() else errors.get()
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill() if background else process.terminate()
                process.join()
    return True


def _child(errors: Any, work: Callable[..., None], job: tuple[Any, ...], background: bool) -> None:
    if background:
        os.nice(_NICE)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has one core
    threading.Thread(target=exit_with_parent, daemon=True).start()
    try:
        work(*job)
    except (UserError, OSError) as error:
        errors.put(type(error)(str(error)[:10_000]))  # less than a pipe holds, so that it never blocks
        sys.exit(1)


def exit_with_parent() -> None:
    """End this process when its parent is killed, so that it does not compete with a rerun."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
