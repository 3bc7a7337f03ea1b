"""Read the metrics, config and result of runs back from their workdirs."""

import array
import dataclasses
import os
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from etils import epath

from ..base import paths, workdir
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
    """Read a workdir whose run may still be going on; see `Reader.read`."""
    return Reader(path).read()


class Reader:
    """Reads a workdir whose run may still be going on, again and again; of its metrics only what is new.

    Attributes:
      bytes_read: bytes of metrics that the last `read` has read.
    """

    def __init__(self, path: Path):
        self._path, self._metrics = path, path / workdir.METRICS
        self.bytes_read = 0
        self._forget()

    def read(self) -> Run:
        """Read the run. Lines of one step are one point.

        Raises:
          UserError: it is not a directory, holds no metrics, or its config or result is damaged.
        """
        path, found = self._path, parts(self._metrics)
        if not path.is_dir():
            raise UserError(f"{path} is not a directory. Give the --workdir of a training run.")
        if not found:
            raise UserError(f"{path} has no {workdir.METRICS}. Give the --workdir of a run that has logged a step.")
        self.bytes_read = 0
        if not self._follow(found):  # a run that resumes drops lines
            self._forget()
            self._follow(found)
        notes = [f"{self._metrics}: line {n} is cut short or not a measurement and was skipped" for n in self._skipped]
        if self._rest:
            notes.append(f"{self._metrics}: line {self._lines + 1} is cut short and was skipped")
        points = self._gathered.points()
        if not len(points.axes["step"]):
            raise UserError(f"{self._metrics} has no readable line. Wait until the run has logged a step.")
        config, result = read_object(path / workdir.CONFIG), workdir.read_result(path)
        starts = tuple(each for each in map(parse_object, _lines(path / workdir.STARTS)) if each)
        return Run(path, points, config or {}, result, tuple(notes), starts, _layers(path / workdir.LAYERS))

    def _forget(self) -> None:
        self._gathered, self._lines, self._skipped, self._rest = _Gathered(), 0, list[int](), b""
        self._known: dict[str, tuple[Any, int]] = {}  # by name of a part: what identifies its beginning, and its size

    def _follow(self, found: list[Path]) -> bool:
        """Add what is new; return False if what was read before has changed."""
        if not self._known.keys() <= {part.name for part in found}:
            return False
        for part in found:
            mark, known = self._known.get(part.name, (None, 0))
            if paths.is_local(part):
                with part.open("rb") as file:
                    now = os.fstat(file.fileno()).st_ino
                    size = file.seek(0, os.SEEK_END)
                    if mark not in (None, now) or size < known:
                        return False
                    file.seek(known)
                    new = file.read()
                self.bytes_read += len(new)
                self._known[part.name] = now, known + len(new)
            else:
                state = paths.modified(part), epath.Path(part).stat().length
                if mark and mark[0] == state:
                    continue
                content = part.read_bytes()
                if mark and mark[1] != zlib.crc32(content[:known]):
                    return False
                self.bytes_read += len(content)
                self._known[part.name] = (state, zlib.crc32(content)), len(content)
                new = content[known:]
            self._add(new)
        return True

    def _add(self, new: bytes) -> None:
        *lines, self._rest = (self._rest + new).split(b"\n")
        if parse_point(self._rest.decode(errors="replace")):  # a whole line without an end
            lines, self._rest = [*lines, self._rest], b""
        for line in filter(None, lines):
            self._lines += 1
            if point := parse_point(line.decode(errors="replace")):
                self._gathered.add(point)
            else:
                self._skipped.append(self._lines)


class _Gathered:
    """Measurements of rising steps, gathered line by line."""

    def __init__(self):
        self._axes: dict[Axis, array.array] = {axis: array.array("d") for axis in AXES}
        self._columns: dict[str, tuple[array.array, array.array]] = {}

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line: the axes (NaN without), and what was measured at that step."""
        axes = self._axes
        if not axes["step"] or line["step"] != axes["step"][-1]:
            for axis, values in axes.items():
                values.append(line.get(axis, np.nan))
        row = len(axes["step"]) - 1
        for name, value in line.items():
            if name in AXES:
                continue
            rows, values = self._columns.setdefault(name, (array.array("i"), array.array("d")))
            if rows and rows[-1] == row:
                rows.pop()
                values.pop()
            rows.append(row)
            values.append(np.nan if value is None else value)

    def points(self) -> Points:
        """Return a copy of what is gathered."""
        return Points(
            {axis: np.array(values) for axis, values in self._axes.items()},
            {name: (np.array(rows), _finite(np.array(values))) for name, (rows, values) in self._columns.items()},
        )


def measured(lines: Iterable[Mapping[str, Any]]) -> Points:
    """Gather measurements of rising steps: each line has the axes (NaN without) and what was measured at that step."""
    gathered = _Gathered()
    for line in lines:
        gathered.add(line)
    return gathered.points()


def parse_point(line: str) -> dict[str, Any] | None:
    """Parse a line of the metrics file; return None if it is cut short or not a measurement."""
    point = parse_object(line)
    if point is None or not all(is_number(point.get(axis)) for axis in AXES):
        return None
    if not isinstance(point["step"], int) or not all(value is None or is_number(value) for value in point.values()):
        return None
    return point


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
