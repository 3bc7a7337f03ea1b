"""Compare runs: group those that differ only in the seed, average and thin curves, find when one reaches a value."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..config.overrides import flat
from ..config.schema import MAY_CHANGE
from .runs import Axis, Run

# Knobs of data sets that change what is trained on, not what is held out.
_TRAINED_ON = ("data.train_split", "data.max_records", "data.shard_size")


class Group(NamedTuple):
    """Runs of one config that differ at most in the seed, under one label."""

    label: str
    runs: tuple[Run, ...]


class Band(NamedTuple):
    """Mean, lowest and highest value over a group's runs at each x; four float64 arrays [points]."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def end(self) -> float | None:
        """The last mean, None for an empty band."""
        return float(self.mean[-1]) if len(self.mean) else None


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
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        label = os.path.relpath(paths[members[0]], parent) + more
        made.append(Group(label, tuple(runs[number] for number in members)))
    return made


def band(group: Group, key: str, axis: Axis) -> Band:
    """Return a group's `key` against `axis`.

    Curves are interpolated linearly between their finite points, at all x of any run within the range that all have.
    The band is empty if a run has no finite point.
    """
    curves = [run.curve(key, axis) for run in group.runs]
    finite = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in curves]
    if any(len(x) == 0 for x, _ in finite):
        return Band(*np.zeros((4, 0)))
    first, end = max(x[0] for x, _ in finite), min(x[-1] for x, _ in finite)
    grid = np.unique(np.concatenate([x for x, _ in finite]))
    grid = grid[(grid >= first) & (grid <= end)]
    values = np.stack([np.interp(grid, x, y) for x, y in finite])
    return Band(grid, values.mean(0), values.min(0), values.max(0))


def thinned(band: Band, most: int) -> Band:
    """Return a band of at most about `most` points: means of neighbours, and the range of all of them.

    Neighbourhoods are even over the band, and finer at its beginning, where curves fall. Both ends stay as they are.
    """
    count = len(band.x)
    if count <= most:
        return band
    even, fine = np.linspace(0, count - 1, most * 3 // 4), np.geomspace(1, count - 1, most // 4)
    fine = fine[fine * (fine[1] - 1) < even[1]]  # as long as its neighbourhoods are the smaller ones
    starts = np.unique(np.concatenate([[0], fine, even[even > fine[-1] + even[1]]]).astype(int))
    sizes = np.diff(np.append(starts, count))
    x, mean = (np.add.reduceat(values, starts) / sizes for values in (band.x, band.mean))
    return Band(x, mean, np.minimum.reduceat(band.low, starts), np.maximum.reduceat(band.high, starts))


def same_targets(groups: Sequence[Group]) -> bool:
    """Return whether the held-out losses of all groups are on the same targets: equal tasks, data and tokenizers."""
    return len({json.dumps(_targets(group.runs[0].config), sort_keys=True) for group in groups}) == 1


def _targets(config: Mapping[str, Any]) -> list[Any]:
    knobs = dict(flat(dict(config)))
    data = {name: value for name, value in knobs.items() if name.startswith("data.")}
    kept = {name: value for name, value in data.items() if name not in (*MAY_CHANGE, *_TRAINED_ON)}
    return [knobs.get("task.name"), kept]


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


def differences(configs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the dotted names of values that differ between configs, with the value in each (None if absent)."""
    flattened = [dict(flat(config)) for config in configs]
    rows = {name: [values.get(name) for values in flattened] for name in sorted(set().union(*flattened))}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}
