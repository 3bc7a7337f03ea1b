"""Read the metrics, config and result of runs back from their workdirs."""

import dataclasses
import pathlib
from typing import Any, Literal

import numpy as np

from ..base import workdir
from ..base.errors import UserError
from ..base.json_files import is_number, parse_object, read_object

Axis = Literal["step", "seconds", "tokens"]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, read from its workdir.

    Attributes:
      path: the workdir.
      points: measurements, one dict per step in rising order. Each has `step`, `seconds` (of training, over all
        resumes), `tokens` (seen so far), and the keys measured at that step.
      config: the resolved config, `{}` if the workdir has none.
      result: the content of `result.json`, or None while the run has not ended.
      notes: warnings for readers of the numbers, such as a line that could not be read.
    """

    path: pathlib.Path
    points: tuple[dict[str, Any], ...]
    config: dict[str, Any]
    result: dict[str, Any] | None
    notes: tuple[str, ...]

    def keys(self) -> list[str]:
        """Return the sorted names of all measurements, without the axes."""
        return sorted(set().union(*self.points) - {"step", "seconds", "tokens"})

    def curve(self, key: str, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
        """Return `axis` and `key` as two float64 arrays [points with both]; NaN for null and non-finite numbers."""
        pairs = [(point[axis], point[key]) for point in self.points if key in point and axis in point]
        x, y = np.array(pairs, float).reshape(-1, 2).T
        return x, np.where(np.isfinite(y), y, np.nan)


def read_run(path: pathlib.Path) -> Run:
    """Read a workdir whose run may still be going on. Lines of one step are one point.

    Raises:
      UserError: it is not a directory, holds no metrics, or its config or result is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a directory. Give the --workdir of a training run.")
    metrics = path / workdir.METRICS
    if not metrics.is_file():
        raise UserError(f"{path} has no {workdir.METRICS}. Give the --workdir of a run that has logged a step.")
    points: dict[int, dict[str, Any]] = {}
    notes = []
    for number, line in enumerate(metrics.read_text(errors="replace").splitlines(), start=1):
        point = parse_point(line)
        if point is None:
            notes.append(f"{metrics}: line {number} is cut short or not a measurement and was skipped")
            continue
        points[point["step"]] = points.get(point["step"], {}) | point
    if not points:
        raise UserError(f"{metrics} has no readable line. Wait until the run has logged a step.")
    config, result = read_object(path / workdir.CONFIG), workdir.read_result(path)
    return Run(path=path, points=tuple(points.values()), config=config or {}, result=result, notes=tuple(notes))


def parse_point(line: str) -> dict[str, Any] | None:
    """Parse a line of the metrics file; return None if it is cut short or not a measurement."""
    point = parse_object(line)
    if point is None or not all(is_number(point.get(axis)) for axis in ("step", "seconds", "tokens")):
        return None
    if not isinstance(point["step"], int) or not all(value is None or is_number(value) for value in point.values()):
        return None
    return point
