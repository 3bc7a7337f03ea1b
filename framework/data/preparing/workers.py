"""Worker processes that end together: when one fails, or when their parent is killed."""

import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ...base.errors import UserError


def run_in_processes(work: Callable[..., None], jobs: Sequence[tuple[Any, ...]]) -> None:
    """Run `work(*job)` for each job in a process of its own.

    Raises:
      UserError, OSError: one of them failed; the others are terminated.
    """
    context: Any = multiprocessing.get_context("spawn")  # a fork of a process that has started JAX may hang
    errors = context.SimpleQueue()
    processes = [context.Process(target=_child, args=(errors, work, job), daemon=True) for job in jobs]
    try:
        for process in processes:
            process.start()
        running = {process.sentinel: process for process in processes}
        while running:
            for sentinel in multiprocessing.connection.wait(list(running)):
                process = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    died = (
                        f"a worker of the preparation died with exit code {process.exitcode}, perhaps for lack of "
                        "memory. Use fewer workers and rerun the command; it continues with the missing shards."
                    )
                    raise UserError(died) if errors.empty() else errors.get()
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _child(errors: Any, work: Callable[..., None], job: tuple[Any, ...]) -> None:
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
