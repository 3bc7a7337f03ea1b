"""A run of several processes as one thing."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from .errors import UserError


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order; every process calls this."""
    if jax.process_count() == 1:
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(content))).reshape(-1)
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(content)] = content
    rows = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def first(work: Callable[[], object]) -> None:
    """Process 0 works while the others wait; a UserError of its is raised in all.

    Raises:
      UserError: process 0 could not.
    """
    failure = ""
    if jax.process_index() == 0:
        try:
            work()
        except UserError as error:
            failure = str(error)
    failure = gather(failure)[0]
    if failure:
        raise UserError(failure)
