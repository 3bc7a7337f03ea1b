"""Exchange values between the processes of a run. Every process calls the same function at the same place."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..base.errors import UserError


def gather(text: str) -> list[str]:
    """Return the texts of all processes, which may differ in length, by process index."""
    mine = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(mine.size)).ravel()
    padded = np.zeros(1 << int(lengths.max()).bit_length(), np.uint8)  # a power of two: each size compiles a program
    padded[: mine.size] = mine
    rows = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def first(work: Callable[[], Any]) -> Any:
    """Run `work` on process 0 and return its (JSON-serialisable) result on every process.

    Raises:
      UserError: `work` has raised it; the message is the same on every process.
    """
    outcome, failure = {}, None
    if jax.process_index() == 0:
        try:
            outcome = {"value": work()}
        except UserError as error:
            outcome, failure = {"error": str(error)}, error
    outcome = json.loads(gather(json.dumps(outcome))[0])
    if "error" in outcome:
        raise failure or UserError(outcome["error"])
    return outcome["value"]
