"""Evaluations of checkpoints: one small file per evaluated step, in a folder of the workdir.

A checkpoint is saved before its step is evaluated, so that an evaluation that fails costs no training. The evaluation
is therefore not part of the checkpoint. `store.record` adds it when it reads the record of a checkpoint.
"""

import dataclasses
import json
from pathlib import Path

from ..base import workdir as layout
from .record import Record


def write(workdir: Path, record: Record) -> None:
    """Write the latest and the best evaluation of a record whose step has been evaluated."""
    content = record.to_json()
    path = _path(workdir, record.step)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"last": content["last"], "best": content["best"]}) + "\n")
    partial.replace(path)


def applied(record: Record, workdir: Path) -> Record:
    """Return the record of a checkpoint with the evaluation of its step, if that was finished.

    Raises:
      ValueError: the file of the evaluation is invalid.
    """
    path = _path(workdir, record.step)
    if not path.is_file():
        return record
    try:
        content = json.loads(path.read_text())
        return Record.from_json(dataclasses.asdict(record) | {"last": content["last"], "best": content["best"]})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is invalid ({error}); delete it") from error


def forget_after(workdir: Path, step: int) -> None:
    """Delete the evaluations of steps after `step`."""
    for path in (workdir / layout.EVALUATIONS).glob("*.json"):
        if path.stem.isdecimal() and int(path.stem) > step:
            path.unlink()


def _path(workdir: Path, step: int) -> Path:
    return workdir / layout.EVALUATIONS / f"{step}.json"
