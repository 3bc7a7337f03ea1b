"""Who makes shards: this process alone, or several at its side that tell it how far they are."""

import multiprocessing
import os
import queue
from collections.abc import Sequence
from typing import Any

from ...base.errors import UserError
from .jobs import Job, Share
from .progress import Progress

_POLL_SECONDS = 0.5


def work_here(job: Job, share: Share, progress: Progress) -> None:
    """Make a share in this process."""
    job.work(share, lambda kind, content: progress.hear(0, kind, content))


def work_in_parallel(job: Job, shares: Sequence[Share], progress: Progress) -> None:
    """Make each share in a process of its own.

    Raises:
      UserError: one of them has failed; the others are ended.
    """
    # A fork of a process that has started JAX may hang.
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    workers = [context.Process(target=_work, args=(job, share, messages, i)) for i, share in enumerate(shares)]
    try:
        for worker in workers:
            worker.start()
        busy = set(range(len(workers)))
        while busy:
            try:
                number, kind, content = messages.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                for number in busy:
                    if workers[number].exitcode is not None:
                        raise UserError(
                            f"preparing worker {number} died with exit code {workers[number].exitcode}, perhaps for "
                            "lack of memory (use fewer workers); the same command goes on from there"
                        ) from None
                continue
            if kind == "error":
                raise UserError(content)
            if kind == "end":
                busy.discard(number)
            else:
                progress.hear(number, kind, content)
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()


def _work(job: Job, share: Share, messages: Any, number: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core is this worker's
    parent = multiprocessing.parent_process()

    def report(kind: str, content: Any) -> None:
        if parent is not None and not parent.is_alive():
            os._exit(1)  # killed: whoever goes on in its place must not meet us
        messages.put((number, kind, content))

    try:
        job.work(share, report)
        report("end", None)
    except UserError as error:
        report("error", str(error))
