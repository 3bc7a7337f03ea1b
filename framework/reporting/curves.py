"""Runs side by side: which differ only in their seed, their mean and range, when a curve reaches a value."""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config.overrides import flat
from .runs import Axis, Run


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one config that differ at most in the seed, under one label."""

    label: str
    runs: tuple[Run, ...]

    def keys(self) -> list[str]:
        """Names of everything that any of the runs measured, sorted."""
        return sorted(set().union(*(run.keys() for run in self.runs)))


@dataclasses.dataclass(frozen=True)
class Band:
    """Mean, lowest and highest value over a group's runs at each x; four float64 arrays [points]."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def last(self) -> float | None:
        """The last finite mean, or None."""
        return last(self.mean)


def groups(runs: Sequence[Run]) -> list[Group]:
    """Put runs whose configs are equal but for the seed together, in the order in which they first come."""
    labels = distinct_names([os.path.abspath(run.path) for run in runs])
    together: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        # A run without a config is like no other.
        same = {name: value for name, value in run.config.items() if name != "seed"} or {"run": number}
        together.setdefault(json.dumps(same, sort_keys=True), []).append(number)
    shared = [_shared_label([labels[i] for i in members]) for members in together.values()]
    return [
        Group(
            label if shared.count(label) == 1 else f"{labels[members[0]]} and {len(members) - 1} more",
            tuple(runs[i] for i in members),
        )
        for label, members in zip(shared, together.values(), strict=True)
    ]


def band(group: Group, key: str, axis: Axis) -> Band:
    """A group's `key` against `axis`.

    One run: as it was measured, NaN where not finite. Several: over the range common to all, at every x that
    any of them has, each interpolated linearly between its finite points; no points where one has none.
    """
    curves = [run.curve(key, axis) for run in group.runs]
    if len(curves) == 1:
        ((x, y),) = curves
        return Band(x, y, y, y)
    finite = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in curves]
    if any(len(x) == 0 for x, _ in finite):
        return Band(*np.zeros((4, 0)))
    first, last = max(x[0] for x, _ in finite), min(x[-1] for x, _ in finite)
    grid = np.unique(np.concatenate([x for x, _ in finite]))
    grid = grid[(grid >= first) & (grid <= last)]
    values = np.stack([np.interp(grid, x, y) for x, y in finite])
    return Band(grid, values.mean(0), values.min(0), values.max(0))


def last(values: np.ndarray) -> float | None:
    """The last finite value, or None."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None


def reach(x: np.ndarray, y: np.ndarray, target: float) -> float | None:
    """The x at which y first falls to target, interpolated linearly from the point before; None if never.

    NaN points are left out. A curve that starts at or below target reaches it at its first x.
    """
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    below = np.flatnonzero(y <= target)
    if len(below) == 0:
        return None
    after = below[0]
    if after == 0:
        return float(x[0])
    before = after - 1
    share = (y[before] - target) / (y[before] - y[after])
    return float(x[before] + share * (x[after] - x[before]))


@dataclasses.dataclass(frozen=True)
class Race:
    """The group that ended highest, the value it ended at, and where each mean curve first falls to it.

    Attributes:
      last: label of that group.
      target: its last mean value.
      whole: the x at which that group ends.
      reached: x for each group's label, None where it never falls to the target.
    """

    last: str
    target: float
    whole: float
    reached: dict[str, float | None]


def race(groups: Sequence[Group], key: str, axis: Axis) -> Race | None:
    """When each group reaches what the worst of them has at its end; None for fewer than two curves."""
    bands = {group.label: band(group, key, axis) for group in groups}
    ends = [(line.last, label) for label, line in bands.items() if line.last is not None]
    if len(ends) < 2:
        return None
    target, slowest = max(ends)
    reached = {label: reach(line.x, line.mean, target) for label, line in bands.items()}
    return Race(slowest, target, float(bands[slowest].x[-1]), reached)


def differences(configs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Dotted names of values that are not the same in all configs, with the value in each (None: absent)."""
    flattened = [dict(flat(config)) for config in configs]
    rows = {name: [values.get(name) for values in flattened] for name in sorted(set().union(*flattened))}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


def distinct_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or as many more parts in front as it takes to tell them all apart."""
    parts = [path.strip(os.sep).split(os.sep) for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [os.sep.join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(paths)):
            return names
    return list(paths)


def _shared_label(labels: Sequence[str]) -> str:
    if len(labels) == 1:
        return labels[0]
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*labels, strict=False))
    shared = re.sub(r"[\W_]*(seed)?[\W_]*$", "", "".join(letters[0] for letters in alike))
    return f"{shared or labels[0]} ({len(labels)} runs)"
