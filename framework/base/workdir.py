"""Names of the files in a workdir, and the reader of its result."""

import pathlib
from typing import Any

from .errors import UserError
from .json_files import is_number, read_object

CONFIG = "config.json"  # the resolved config
PARAMETERS = "parameters.txt"  # the table printed at start
METRICS = "metrics.jsonl"  # one JSON object per line and measured step
RESULT = "result.json"  # written when the run ends
CHECKPOINTS = "checkpoints"
DAMAGED = "damaged"  # damaged checkpoints, moved out of the way
RESTORED = "restored.txt"  # what the newest start took over from a checkpoint, line by line
STALLS = "stalls"  # stack traces of each process, written when nothing has moved for a while
LOCK = "lock"  # held by the run that uses the workdir
CACHE = "data"  # tokenizer and packed examples


def read_result(path: pathlib.Path) -> dict[str, Any] | None:
    """Return the result of a workdir's run, or None if the run has not ended.

    Raises:
      UserError: the file is damaged.
    """
    result = read_object(path / RESULT)
    if result is None:
        return None
    fine = (
        all(is_number(result.get(key)) for key in ("steps", "seconds", "tokens"))
        and all(key in result for key in ("heldout_loss", "best_heldout_loss", "stopped"))
        and all(result[key] is None or is_number(result[key]) for key in ("heldout_loss", "best_heldout_loss"))
        and isinstance(result["stopped"], str | None)
    )
    if not fine:
        raise UserError(f"{path / RESULT} is damaged. Remove it and rerun the training command to write it again.")
    return result
