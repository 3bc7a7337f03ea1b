"""Names of the files in a workdir, and the reader of its result."""

import pathlib
from typing import Any

from . import paths
from .errors import UserError
from .json_files import read_object
from .paths import Path
from .values import convert

CONFIG = "config.json"  # the resolved config
PARAMETERS = "parameters.txt"  # the table printed at start
METRICS = "metrics.jsonl"  # one JSON object per line and measured step
LAYERS = "layers.jsonl"  # one JSON object per step at which the layers were measured
SAMPLES = "samples.jsonl"  # one JSON object per prompt and sampled step
STARTS = "starts.jsonl"  # one JSON object per start: command, commit, date, machine, devices
RESULT = "result.json"  # written when the run ends
CHECKPOINTS = "checkpoints"
DAMAGED = "damaged"  # damaged checkpoints, moved out of the way
CHANGES = "changes"  # what later starts have changed in the config, a file for each, named by the time in UTC
RESTORED = "restored.txt"  # what the newest start took over from a checkpoint, line by line
STALLS = "stalls"  # stack traces of each process, written when nothing has moved for a while
TRACKED = "tracked.txt"  # id of the run in experiment trackers
LOCK = "lock"  # held by the run that uses the workdir
CACHE = "data"  # tokenizer and packed examples

_RESULT_TYPES: dict[str, Any] = dict.fromkeys(("steps", "seconds", "tokens"), float) | {
    "heldout_loss": float | None,
    "best_heldout_loss": float | None,
    "stopped": str | None,
}


def cache(workdir: Path) -> Any:
    """Return the folder of prepared data. Data sets of users expect a `pathlib.Path`, unless it is in a bucket."""
    place = workdir / CACHE
    return pathlib.Path(place) if paths.is_local(place) else place


def read_result(path: Path) -> dict[str, Any] | None:
    """Return the result of a workdir's run, or None if the run has not ended.

    Raises:
      UserError: the file is damaged.
    """
    result = read_object(path / RESULT)
    if result is None:
        return None
    try:
        for key, hint in _RESULT_TYPES.items():
            convert(result[key], hint)
    except (KeyError, TypeError):
        told = f"{path / RESULT} is damaged. Remove it and rerun the training command to write it again."
        raise UserError(told) from None
    return result
