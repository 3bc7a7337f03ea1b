"""What a workdir holds: the names of its files, and how its metrics, config and result are read back."""

import dataclasses
import json
import math
import pathlib
from typing import Any, Literal

import numpy as np

from .errors import UserError

CONFIG = "config.json"  # the resolved config
PARAMETERS = "parameters.txt"  # the table printed at start
SCHEDULE = "schedule.json"  # what the optimizer's options left open and measurement has decided
METRICS = "metrics.jsonl"  # one JSON object per line and measured step
RESULT = "result.json"  # written when the run ends
CHECKPOINTS = "checkpoints"
DAMAGED = "damaged"  # checkpoints that were found damaged, moved out of the way
RESTORED = "restored.txt"  # what the newest start took over from a checkpoint, line by line
STALLS = "stalls"  # where each process stood when nothing had moved for a while
LOCK = "lock"  # held by the run that is at work here
CACHE = "data"  # tokenizer and packed examples

_DEEPEST = 32  # levels in a JSON file; far more than ours have, and few enough for whoever walks through them

Axis = Literal["step", "seconds", "tokens"]


@dataclasses.dataclass(frozen=True)
class Run:
    """One workdir, read.

    Attributes:
      path: the workdir.
      points: what was measured, one dict per step in rising order; each has `step`, `seconds` (of training,
        over all resumes) and `tokens` (seen so far), and the keys measured at that step.
      config: the resolved config, `{}` where the workdir has none.
      result: the content of `result.json`, or None while the run has not ended.
      notes: what a reader of the numbers should know, such as a line that could not be read.
    """

    path: pathlib.Path
    points: tuple[dict[str, Any], ...]
    config: dict[str, Any]
    result: dict[str, Any] | None
    notes: tuple[str, ...]

    def keys(self) -> list[str]:
        """Names of everything measured, axes left out, sorted."""
        return sorted(set().union(*self.points) - {"step", "seconds", "tokens"})

    def curve(self, key: str, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
        """`key` against `axis`: two float64 arrays [points with both]; NaN where null or not finite."""
        pairs = [(point[axis], point[key]) for point in self.points if key in point and axis in point]
        x, y = np.array([[_number(value) for value in pair] for pair in pairs]).reshape(-1, 2).T
        return x, y


def read(path: pathlib.Path) -> Run:
    """Read a workdir, finished or not.

    Raises:
      UserError: it is no directory, holds no metrics, or its config or result is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no directory; give the --workdir of a training run")
    if not (path / METRICS).is_file():
        raise UserError(f"{path} holds no {METRICS}; give the --workdir of a run that has logged a step")
    points, notes = read_points(path / METRICS)
    if not points:
        raise UserError(f"{path / METRICS} holds no readable line; wait until the run has logged a step")
    config, result = read_json(path / CONFIG), read_result(path)
    if config is None:
        notes.append(f"{path}: no {CONFIG}")
    if result is None:
        notes.append(f"{path}: no {RESULT}: the run has not ended, numbers are those of its last evaluation")
    return Run(path=path, points=tuple(points), config=config or {}, result=result, notes=tuple(notes))


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file.

    Raises:
      UserError: the file holds something else.
    """
    if not path.is_file():
        return None
    try:
        content = parse_object(path.read_text())
    except UnicodeDecodeError:
        content = None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    if content is None:
        raise UserError(f"{path} is not a JSON object; restore it or use another workdir")
    return content


def read_result(path: pathlib.Path) -> dict[str, Any] | None:
    """The result of a workdir's run, or None while it has none.

    Raises:
      UserError: the file is damaged.
    """
    result = read_json(path / RESULT)
    if result is None:
        return None
    fine = (
        all(is_number(result.get(key)) for key in ("steps", "seconds", "tokens"))
        and all(key in result for key in ("heldout_loss", "best_heldout_loss", "stopped"))
        and all(result[key] is None or is_number(result[key]) for key in ("heldout_loss", "best_heldout_loss"))
        and isinstance(result["stopped"], str | None)
    )
    if not fine:
        raise UserError(f"{path / RESULT} is damaged; remove it, and the training command writes it again")
    return result


def read_points(path: pathlib.Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read a metrics file as (points by rising step, notes about lines left out).

    Lines of one step are one point. A run that was killed goes on from its last checkpoint and measures some
    steps anew: what it wrote last holds. A line cut short by the kill is left out and noted.
    """
    points: dict[int, dict[str, Any]] = {}
    notes = []
    last = 0
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        point = parse_point(line)
        if point is None:
            notes.append(f"{path}: line {number} is cut short or no measurement and was left out")
            continue
        step = point["step"]
        if step < last:
            points = {earlier: kept for earlier, kept in points.items() if earlier < step}
        points[step] = points.get(step, {}) | point
        last = step
    return [points[step] for step in sorted(points)], notes


def parse_point(line: str) -> dict[str, Any] | None:
    """What a line of the metrics file says; None where it is cut short or no measurement."""
    point = parse_object(line)
    if point is None or not all(is_number(point.get(axis)) for axis in ("step", "seconds", "tokens")):
        return None
    if not isinstance(point["step"], int) or not all(value is None or is_number(value) for value in point.values()):
        return None
    return point


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text holds; None where it holds something else, or is no file of ours."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, an integer of thousands of digits, or thousands of levels
        return None
    return content if isinstance(content, dict) and _is_shallow(content) else None


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a number that a float64 can hold; True and False are none."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _is_shallow(content: Any) -> bool:
    level = [content]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in level if isinstance(inner, (dict, list))]
        if not level:
            return True
    return False


def _number(value: Any) -> float:
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else math.nan
