"""Draw training runs as one HTML page that needs no other file and no network.

This module gathers what the page shows as JSON; `page.html` has the layout, the style and the script that draws it.
"""

import datetime
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from ..base import parts, paths, workdir
from ..base.errors import UserError
from ..base.json_files import is_number, parse_object
from ..base.paths import Path
from ..checkpoint import shelf
from ..config.check import to_json
from ..config.overrides import flat
from ..config.schema import get_config
from . import curves, meanings, status
from .curves import Group
from .runs import AXES, LAYER_METRICS, Axis, Layers, Run
from .status import BYTES, HELDOUT

_POINTS, _FEWER_POINTS = 600, 250  # at most of a line of the first panel and of the others
_CELLS = 40_000  # at most of a heat map
_OPTIMIZER = "optimizer/"
# Panels by section, in order. Each shows train/NAME and heldout/NAME, or any name that ends with it.
_LEARNING = ("loss", "bits_per_byte", "bits_per_character", "accuracy")
_STEPS = ("learning_rate", "gradient_norm", "update_norm", "skipped", "clipped")
_SPEED = ("tokens_per_second", "mfu", "input_wait")
_AGAIN = (
    "throughput/steps_per_second",
    "throughput/examples_per_second",
    "checkpoint/bytes",
    "checkpoint/seconds",
    "checkpoint/blocked_seconds",
)
_SHARES = ("accuracy", "mfu", "input_wait", "real_tokens", "dropped_tokens", "busy")  # of one, never on a log axis
Table = list[list[str]]  # rows of text, the headings first


def page(runs: Sequence[Run], *, baseline: Path | None = None, reload_seconds: float = 0.0) -> str:
    """Return the page as HTML.

    Args:
      runs: the runs.
      baseline: workdir of the run that the others are compared with; by default the first whose optimizer has no
        diagnostics among runs that have some, or else the first.
      reload_seconds: after which the page reads its file again; 0 for never.

    Raises:
      UserError: the baseline is not among the runs.
    """
    data = contents(runs, baseline) | {"reload": reload_seconds}
    template = pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # "</script>" in a name must not end the script; "<" occurs in strings only.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    before, between, after = re.split("{{data}}|{{plotly}}", template)
    return "".join((before, text, between, get_plotlyjs(), after))


def contents(runs: Sequence[Run], baseline: Path | None = None) -> dict[str, Any]:
    """Return all that the page shows."""
    groups = curves.groups(runs)
    against = _baseline(groups, baseline)
    compared, notes = _comparison(groups)
    grids = _Grids()
    panels, folded = _panels(groups, grids, compared)
    firsts = [group.runs[0] for group in groups]
    labels = [group.label for group in groups]
    states = [status.state(run).kind for run in runs]
    return {
        "states": ", ".join(f"{states.count(kind)} {kind}" for kind in dict.fromkeys(states)),
        "title": ", ".join(labels) if len(labels) <= 3 else f"{len(runs)} runs in {_shared(runs)}",
        "written": f"{datetime.datetime.now():%d %B %Y, %H:%M}",
        "groups": [{"label": group.label, "runs": len(group.runs)} for group in groups],
        "runs": [
            _card(run, i, None if group is against else against, compared, len(groups))
            for i, group, run in _each(groups)
        ],
        "notes": notes,
        "race": race(groups, compared) if compared else race([]),
        "panels": panels,
        "folded": folded,
        "layers": [_heat(i, run, found) for i, run in enumerate(firsts) if (found := _layers(run))],
        "grids": grids.made,
        "differences": _differences(groups),
        "about": [_about(run, i) for i, _, run in _each(groups)],
        "counted": "examples" if _counts_examples(runs) else "tokens",
    }


def race(groups: Sequence[Group], key: str = HELDOUT) -> dict[str, Any]:
    """Return when each group reaches the last value of the worst one, and as which share of that one's run.

    There are no rows for fewer than two groups with held-out values.
    """
    bands = {group.label: {axis: curves.band(group, key, axis) for axis in AXES} for group in groups}
    ends = [(end, label) for label, lines in bands.items() if (end := lines["step"].end) is not None]
    if len(ends) < 2:
        return {"told": "", "rows": []}
    target, worst = max(ends)
    rows = [["run", "steps", "seconds", "tokens"]]
    for label, lines in bands.items():
        row = [label]
        for axis, line in lines.items():
            at, whole = curves.reach(line.x, line.mean, target), bands[worst][axis].x[-1] if len(line.x) else 0
            row.append("not reached" if at is None else f"{at:,.0f} ({at / whole:.0%})")
        rows.append(row)
    what = "held-out loss falls" if key == HELDOUT else "held-out bits per byte fall"
    return {"told": f"Until the {what} to {target:.4f}, where {worst} ends.", "rows": rows}


class _Grids:
    """Positions of points on all axes, shared by the lines that are measured at the same steps."""

    def __init__(self):
        self.made: list[dict[str, list[float]]] = []
        self._known: dict[bytes, int] = {}
        self._axes: dict[str, dict[Axis, np.ndarray]] = {}

    def at(self, group: Group, steps: np.ndarray) -> int:
        """Return the number of the grid at these steps of a group; its seconds and tokens are means over the runs."""
        key = group.label.encode() + steps.tobytes()
        if key not in self._known:
            self._known[key] = len(self.made)
            of_runs = [run.points.axes for run in group.runs]
            rest = {
                axis: np.mean([np.interp(steps, axes["step"], axes[axis]) for axes in of_runs], axis=0)
                for axis in ("seconds", "tokens")
            }
            self.made.append({"step": _short(steps, 7), **{axis: _short(values, 7) for axis, values in rest.items()}})
        return self._known[key]


def _panels(groups: Sequence[Group], grids: _Grids, compared: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the panels in their order, and the titles of those that are folded because they never change."""
    keys = sorted(set().union(*(run.keys() for group in groups for run in group.runs)))
    together: dict[str, list[str]] = {}
    for key in keys:
        first, _, rest = key.partition("/")
        together.setdefault(rest if first in ("train", "heldout") else key, []).append(key)
    made, folded = [], []
    for name, members in sorted(together.items(), key=lambda item: _place(item[0], item[1])):
        section = _section(members)
        most = _POINTS if name == "loss" else _FEWER_POINTS
        pairs = [(i, group, key) for key in members for i, group in enumerate(groups)]
        lines = [line for each in pairs if (line := _line(*each, grids, most))]
        if not lines:
            continue
        words = meanings.of(members[0] if len(members) == 1 else name)
        values = {value for line in lines for part in ("y", "high") for value in line.get(part, ())}
        if len(values) == 1:
            folded.append(f"{words.title.partition(',')[0]} ({values.pop():.4g})")
            continue
        panel = {"id": name, "section": section, **words._asdict(), "share": name.rpartition("/")[2] in _SHARES}
        if name == "loss" and compared != HELDOUT and len(groups) > 1:
            panel["told"] += " These runs have other targets: their losses do not compare."
        made.append(panel | {"lines": lines})
    return made, list(dict.fromkeys(folded))


def _line(index: int, group: Group, key: str, grids: _Grids, most: int) -> dict[str, Any] | None:
    whole = curves.band(group, key, "step")
    if not len(whole.x):
        return None
    line = curves.thinned(whole, most)
    made = {"group": index, "of": key.partition("/")[0], "grid": grids.at(group, line.x), "y": _short(line.mean)}
    if not np.array_equal(line.low, line.high):
        made |= {"low": _short(line.low), "high": _short(line.high)}
    return made


def _section(members: Sequence[str]) -> str:
    name = members[0]
    if name in _AGAIN or (name.startswith(_OPTIMIZER) and name.count("/") > 1):
        return "more"
    if name.startswith("train/") or name.startswith("heldout/"):
        return "learning"
    return "optimizer" if name.startswith(_OPTIMIZER) else "speed"


def _place(name: str, members: Sequence[str]) -> tuple[Any, ...]:
    order = (*_LEARNING, *_STEPS, *_SPEED)
    end = name.rpartition("/")[2]
    held = any(member.startswith("heldout/") for member in members)
    position = order.index(end) if end in order else len(_LEARNING) - 0.5 if held else len(order)
    return position, name


def _comparison(groups: Sequence[Group]) -> tuple[str | None, list[str]]:
    """Return the held-out measurement by which groups compare, or None, and notes for the reader."""
    if curves.same_targets(groups):
        return HELDOUT, []
    differing = curves.differences([group.runs[0].config for group in groups])
    knobs = ", ".join(name for name in differing if name.startswith(("data.", "task.name"))) or "the data"
    if all(BYTES in run.points.columns for group in groups for run in group.runs):
        told = "The runs are compared in bits per byte; texts differ in difficulty too."
        return BYTES, [f"Losses do not compare here: the runs differ in {knobs}. {told}"]
    return None, [f"These runs are not compared: they differ in {knobs}, and not all measure bits per byte."]


def _baseline(groups: Sequence[Group], chosen: Path | None) -> Group | None:
    if chosen is not None:
        for group in groups:
            if any(paths.of(run.path) == paths.of(chosen) for run in group.runs):
                return group
        raise UserError(f"--baseline={chosen}: must be among the workdirs. Add it.")
    if len(groups) < 2:
        return None
    plain = [group for group in groups if not any(key.startswith(_OPTIMIZER) for key in group.runs[0].points.columns)]
    return plain[0] if plain and len(plain) < len(groups) else groups[0]


def _card(run: Run, index: int, against: Group | None, compared: str | None, groups: int) -> dict[str, Any]:
    kind, told = status.state(run)
    total, key = status.total_steps(run), compared or HELDOUT
    facts = status.facts(run, against.runs[0] if against and compared else None, key)
    if groups == 1:
        facts[0] = facts[0]._replace(note=facts[0].note or "no baseline in this report")
    return {
        "group": index,
        "name": paths.of(run.path).name,
        "state": kind,
        "told": told,
        "steps": run.steps,
        "total": total,
        "facts": [fact._asdict() for fact in facts],
        "wrong": status.wrong(run),
    }


def _layers(run: Run) -> Layers | None:
    """Return the measurements of a run's layers, or those of its buckets if it has no others."""
    if run.layers is not None:
        return run.layers
    found = sorted(key for key in run.points.columns if key.startswith(_OPTIMIZER) and key.endswith("/condition"))
    names = [key[len(_OPTIMIZER) : -len("/condition")] for key in found]
    if not names:
        return None
    steps = run.curve(f"{_OPTIMIZER}{names[0]}/condition", "step")[0]
    values = {end: np.full((len(names), len(steps)), np.nan) for end in LAYER_METRICS}
    for end, table in values.items():
        for row, name in enumerate(names):
            at, found = run.curve(f"{_OPTIMIZER}{name}/{end}", "step")
            table[row, np.searchsorted(steps, at[np.isin(at, steps)])] = found[np.isin(at, steps)]
    return Layers(tuple(name.replace("_", " ") for name in names), steps, values)


def _heat(index: int, run: Run, layers: Layers) -> dict[str, Any]:
    """Return the heat maps of a run; one that is zero throughout has no values."""
    most = max(20, _CELLS // len(layers.names))
    kept = np.unique(np.linspace(0, len(layers.steps) - 1, min(most, len(layers.steps), 200)).astype(int))
    steps = layers.steps[kept]
    maps = []
    for name in LAYER_METRICS:
        words, table = meanings.of(name), layers.values[name][:, kept]
        rows = [_short(row, 4) for row in table] if np.nansum(np.abs(table)) else []
        maps.append({"id": name, **words._asdict(), "rows": rows})
    axes = {axis: _short(np.interp(steps, run.points.axes["step"], run.points.axes[axis]), 7) for axis in AXES}
    return {"group": index, "names": _brief(layers.names), "axes": axes, "maps": maps}


def _brief(names: Sequence[str]) -> list[str]:
    """Return paths of parameters without the parts that all have in common at their beginning and end."""
    split = [name.partition(" ") for name in names]
    paths = [path.split("/") for path, _, _ in split]
    first, last = _common(paths), _common([path[::-1] for path in paths])
    if min(map(len, paths)) <= first + last:
        return list(names)
    return [
        f"{'/'.join(x[first : len(x) - last])} {number}".strip() for x, (_, _, number) in zip(paths, split, strict=True)
    ]


def _common(lists: Sequence[Sequence[str]]) -> int:
    """Return at how many places, from the first, all lists are equal."""
    levels = [len(set(level)) == 1 for level in zip(*lists, strict=False)]
    return [*levels, False].index(False)


def _differences(groups: Sequence[Group]) -> Table:
    found = curves.differences([group.runs[0].config for group in groups])
    # Knobs that another component does not have say no more than its name.
    others = tuple(name.removesuffix("name") for name in found if name.endswith(".name"))
    shown = {name: values for name, values in found.items() if not (name.startswith(others) and None in values)}
    rows = [[name, *map(_cell, values)] for name, values in shown.items() if name != "seed"]
    return [["knob", *(group.label for group in groups)], *rows] if rows else []


def _about(run: Run, index: int) -> dict[str, Any]:
    """Return what a run was: its starts, config, changes, result, parameters, checkpoints and samples."""
    parameters = run.path / workdir.PARAMETERS
    samples = [each for each in map(parse_object, parts.lines(run.path / workdir.SAMPLES)) if each]
    changes = [path for path in paths.listed(run.path / workdir.CHANGES) if path.suffix == ".txt"]
    return {
        "group": index,
        "name": paths.of(run.path).name,
        "path": str(paths.of(run.path)),
        "starts": [_start(each) for each in run.starts],
        "config": _config(run.config),
        "changes": [[path.stem.partition(".")[0].replace("T", " "), _text(path).strip()] for path in changes],
        "result": [[name.replace("_", " "), _cell(value)] for name, value in (run.result or {}).items()],
        "parameters": _text(parameters),
        "checkpoints": _checkpoints(run.path),
        "samples": [
            [f"{each.get('prompt', '')}", f"{each.get('text', '')}"]
            for each in samples
            if each.get("step") == samples[-1].get("step")
        ],
    }


def _config(config: Mapping[str, Any]) -> Table:
    """Return the knobs of a config, with a star where one of the trainer has another value than by default."""
    defaults = dict(flat(json.loads(to_json(get_config()))))
    changed = [
        name in defaults and not name.endswith(".name") and defaults[name] != value
        for name, value in flat(dict(config))
    ]
    return [
        [f"{name} *" if star else name, _cell(value)]
        for star, (name, value) in zip(changed, flat(dict(config)), strict=True)
    ]


def _start(start: Mapping[str, Any]) -> Table:
    return [[name.replace("_", " "), _cell(value)] for name, value in start.items()]


def _checkpoints(place: Path) -> Table:
    rows = [["step", "saved", "size"]]
    for path in shelf.checkpoints(place):
        size = sum(paths.files(path).values())
        written = path if paths.is_local(path) else path / shelf.COMMITTED
        saved = datetime.datetime.fromtimestamp(paths.modified(written))
        rows.append([f"{int(path.name):,}", f"{saved:%Y-%m-%d %H:%M}", f"{status.short(size)}B"])
    return rows if len(rows) > 1 else []


def _each(groups: Sequence[Group]) -> Iterable[tuple[int, Group, Run]]:
    return ((index, group, run) for index, group in enumerate(groups) for run in group.runs)


def _counts_examples(runs: Sequence[Run]) -> bool:
    measured = set().union(*(run.keys() for run in runs))
    return "throughput/examples_per_second" in measured and "throughput/tokens_per_second" not in measured


def _shared(runs: Sequence[Run]) -> str:
    parents = {os.fspath(paths.of(run.path).parent) for run in runs}
    places = {path.partition("://")[0] if "://" in path else "" for path in parents}
    return os.path.basename(os.path.commonpath(parents)) or "/" if len(places) == 1 else "several places"


def _text(path: Path) -> str:
    return paths.read_text(path) if path.exists() else ""


def _short(values: np.ndarray, digits: int = 5) -> list[Any]:
    """Return numbers for JSON: a few digits, integers where they are whole, null for NaN."""
    short = (float(f"{value:.{digits}g}") for value in values.tolist())
    return [None if value != value else int(value) if value.is_integer() else value for value in short]


def _cell(value: Any) -> str:
    if not is_number(value):
        return "-" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if abs(value) >= 0.1 else f"{value:.4g}"
