"""Compare runs: group those that differ only in the seed, average their curves, and find when each reaches a value."""

import json
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..config.overrides import flat
from .runs import Axis, Run


class Group(NamedTuple):
    """Runs of one config that differ at most in the seed, under one label."""

    label: str
    runs: tuple[Run, ...]

    def keys(self) -> list[str]:
        """Return the sorted names of all measurements of the runs."""
        return sorted(set().union(*(run.keys() for run in self.runs)))


class Band(NamedTuple):
    """Mean, lowest and highest value over a group's runs at each x; four float64 arrays [points]."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Race(NamedTuple):
    """The last value of the group that ends highest, and where each group's mean first falls to it.

    Attributes:
      last: label of the group that ends highest.
      target: its last mean value.
      whole: the x of its end.
      reached: x by label, None for a group that never falls to the target.
    """

    last: str
    target: float
    whole: float
    reached: dict[str, float | None]


def groups(runs: Sequence[Run]) -> list[Group]:
    """Group runs whose configs are equal except for the seed, in order of first appearance."""
    paths = [os.path.abspath(run.path) for run in runs]
    parent = os.path.commonpath([os.path.dirname(path) for path in paths])
    together: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        # A run without a config gets a group of its own.
        same = {name: value for name, value in run.config.items() if name != "seed"} or {"run": number}
        together.setdefault(json.dumps(same, sort_keys=True), []).append(number)
    made = []
    for members in together.values():
        names = [os.path.relpath(paths[number], parent) for number in members]
        label = names[0]
        if len(names) > 1:
            without_seed = re.sub(r"[\W_]*seed[\W_]*\d+$", "", label) or label
            label = f"{without_seed} ({len(names)} runs)"
        if label in {group.label for group in made}:
            label = f"{names[0]} and {len(names) - 1} more"
        made.append(Group(label, tuple(runs[number] for number in members)))
    return made


def band(group: Group, key: str, axis: Axis) -> Band:
    """Return a group's `key` against `axis`.

    The curve of one run is returned as measured, with NaN for values that are not finite. Several curves are
    interpolated linearly between their finite points, at all x of any of them within the range common to all; the band
    is empty if a run has no finite point.
    """
    curves = [run.curve(key, axis) for run in group.runs]
    if len(curves) == 1:
        ((x, y),) = curves
        return Band(x, y, y, y)
    finite = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in curves]
    if any(len(x) == 0 for x, _ in finite):
        return Band(*np.zeros((4, 0)))
    first, end = max(x[0] for x, _ in finite), min(x[-1] for x, _ in finite)
    grid = np.unique(np.concatenate([x for x, _ in finite]))
    grid = grid[(grid >= first) & (grid <= end)]
    values = np.stack([np.interp(grid, x, y) for x, y in finite])
    return Band(grid, values.mean(0), values.min(0), values.max(0))


def last(values: np.ndarray) -> float | None:
    """Return the last finite value, or None."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None


def reach(x: np.ndarray, y: np.ndarray, target: float) -> float | None:
    """Return the x at which y first falls to target, interpolated linearly from the point before, or None.

    NaN points are ignored. A curve that starts at or below the target reaches it at its first x.
    """
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    below = np.flatnonzero(y <= target)
    if len(below) == 0:
        return None
    after = below[0]
    if after == 0:
        return float(x[0])
    return float(np.interp(-target, -y[[after - 1, after]], x[[after - 1, after]]))


def race(groups: Sequence[Group], key: str, axis: Axis) -> Race | None:
    """Return when each group reaches the last value of the worst one; None for fewer than two curves."""
    bands = {group.label: band(group, key, axis) for group in groups}
    ends = [(end, label) for label, line in bands.items() if (end := last(line.mean)) is not None]
    if len(ends) < 2:
        return None
    target, slowest = max(ends)
    reached = {label: reach(line.x, line.mean, target) for label, line in bands.items()}
    return Race(slowest, target, float(bands[slowest].x[-1]), reached)


def differences(configs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the dotted names of values that differ between configs, with the value in each (None if absent)."""
    flattened = [dict(flat(config)) for config in configs]
    rows = {name: [values.get(name) for values in flattened] for name in sorted(set().union(*flattened))}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}
