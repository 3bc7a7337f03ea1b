"""What the processes of a run tell each other: every process calls the same function at the same place."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..base.errors import UserError


def gather(text: str) -> list[str]:
    """The texts of all processes, of any lengths, by process index."""
    mine = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(mine.size)).ravel()
    # A power of two: every size is a program to compile.
    padded = np.zeros(1 << int(lengths.max()).bit_length(), np.uint8)
    padded[: mine.size] = mine
    rows = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def first(work: Callable[[], Any]) -> Any:
    """Process 0 works while the others wait; what it returns, which must be good for JSON, is returned in all.

    Raises:
      UserError: the work has raised it; with the same message in all.
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
