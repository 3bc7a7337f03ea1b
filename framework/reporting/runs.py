"""Read the metrics, config and result of runs back from their workdirs."""

import array
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from ..base import workdir
from ..base.errors import UserError
from ..base.json_files import is_number, parse_object, read_object
from ..base.parts import parts
from ..base.paths import Path

Axis = Literal["step", "seconds", "tokens"]
AXES: tuple[Axis, ...] = ("step", "seconds", "tokens")
# Where the optimizer's state is measured for each layer, see `optimizer.layers`.
LAYER_METRICS = ("condition", "effective_rank", "staleness", "graft_ratio", "fallbacks")


class Points(NamedTuple):
    """Measurements of a run.

    Attributes:
      axes: float64 [points], rising: steps, seconds of training over all resumes, and tokens seen.
      columns: name -> (positions int32 [n] in the axes, values float64 [n]) of the points that have it; NaN for null.
    """

    axes: Mapping[Axis, np.ndarray]
    columns: Mapping[str, tuple[np.ndarray, np.ndarray]]


class Layers(NamedTuple):
    """Measurements of each layer.

    Attributes:
      names: of the layers.
      steps: [times] steps after which they were measured.
      values: name of a metric -> float64 [layers, times], NaN where it is not known.
    """

    names: tuple[str, ...]
    steps: np.ndarray
    values: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, read from its workdir.

    Attributes:
      path: the workdir.
      points: the measurements.
      config: the resolved config, `{}` if the workdir has none.
      result: the content of `result.json`, or None while the run has not ended.
      notes: warnings for readers of the numbers, such as a line that could not be read.
      starts: what each process start has written, oldest first; see `startup.note_start`.
      layers: measurements of each layer, None if the run has none.
    """

    path: Any
    points: Points
    config: dict[str, Any]
    result: dict[str, Any] | None
    notes: tuple[str, ...] = ()
    starts: tuple[dict[str, Any], ...] = ()
    layers: Layers | None = None

    @property
    def steps(self) -> int:
        """Steps up to the last measurement."""
        return int(self.points.axes["step"][-1])

    def keys(self) -> list[str]:
        """Return the sorted names of all measurements, without the axes."""
        return sorted(self.points.columns)

    def curve(self, key: str, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
        """Return `axis` and `key` as two float64 arrays [points with both]; NaN for null and non-finite numbers."""
        if key not in self.points.columns:
            return np.zeros(0), np.zeros(0)
        rows, values = self.points.columns[key]
        return self.points.axes[axis][rows], values

    def last(self, key: str) -> float | None:
        """Return the last value of a measurement, None if it was never measured or is not finite."""
        values = self.curve(key, "step")[1]
        return float(values[-1]) if len(values) and np.isfinite(values[-1]) else None


def read_run(path: Path) -> Run:
    """Read a workdir whose run may still be going on. Lines of one step are one point.

    Raises:
      UserError: it is not a directory, holds no metrics, or its config or result is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a directory. Give the --workdir of a training run.")
    metrics = path / workdir.METRICS
    if not parts(metrics):
        raise UserError(f"{path} has no {workdir.METRICS}. Give the --workdir of a run that has logged a step.")
    notes: list[str] = []
    points = measured(_parsed(metrics, notes))
    if not len(points.axes["step"]):
        raise UserError(f"{metrics} has no readable line. Wait until the run has logged a step.")
    config, result = read_object(path / workdir.CONFIG), workdir.read_result(path)
    starts = tuple(each for each in map(parse_object, _lines(path / workdir.STARTS)) if each)
    return Run(path, points, config or {}, result, tuple(notes), starts, _layers(path / workdir.LAYERS))


def measured(lines: Iterable[Mapping[str, Any]]) -> Points:
    """Gather measurements of rising steps: each line has the axes (NaN without) and what was measured at that step."""
    axes: dict[Axis, array.array] = {axis: array.array("d") for axis in AXES}
    columns: dict[str, tuple[array.array, array.array]] = {}
    for line in lines:
        if not axes["step"] or line["step"] != axes["step"][-1]:
            for axis, values in axes.items():
                values.append(line.get(axis, np.nan))
        row = len(axes["step"]) - 1
        for name, value in line.items():
            if name in AXES:
                continue
            rows, values = columns.setdefault(name, (array.array("i"), array.array("d")))
            if rows and rows[-1] == row:
                rows.pop()
                values.pop()
            rows.append(row)
            values.append(np.nan if value is None else value)
    return Points(
        {axis: np.array(values) for axis, values in axes.items()},
        {name: (np.array(rows), _finite(np.array(values))) for name, (rows, values) in columns.items()},
    )


def parse_point(line: str) -> dict[str, Any] | None:
    """Parse a line of the metrics file; return None if it is cut short or not a measurement."""
    point = parse_object(line)
    if point is None or not all(is_number(point.get(axis)) for axis in AXES):
        return None
    if not isinstance(point["step"], int) or not all(value is None or is_number(value) for value in point.values()):
        return None
    return point


def _parsed(path: Path, notes: list[str]) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        point = parse_point(line)
        if point is None:
            notes.append(f"{path}: line {number} is cut short or not a measurement and was skipped")
        else:
            yield point


def _lines(path: Path) -> Iterable[str]:
    for part in parts(path):
        with part.open("rb") as file:
            for line in file:
                yield bytes(line).decode(errors="replace")


def _layers(path: Path) -> Layers | None:
    """Read the lines {"step": ..., "names": [...], metric: [a value or null of each layer]}; names only if changed."""
    names: tuple[str, ...] = ()
    steps, rows = [], []
    for line in map(parse_object, _lines(path)):
        if not line or not is_number(line.get("step")):
            continue
        if isinstance(line.get("names"), list) and (new := tuple(map(str, line["names"]))) != names:
            names, steps, rows = new, [], []  # parameters are treated otherwise: a new table
        row = [line.get(metric) for metric in LAYER_METRICS]
        if names and all(isinstance(each, list) and len(each) == len(names) for each in row):
            steps.append(line["step"])
            rows.append(row)
    if not rows:
        return None
    table = np.array([[[v if is_number(v) else np.nan for v in each] for each in row] for row in rows], float)
    return Layers(names, np.array(steps), {name: _finite(table[:, i].T) for i, name in enumerate(LAYER_METRICS)})


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)
