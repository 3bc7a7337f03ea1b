"""Draw training runs as one HTML page that needs no other file and no network."""

import datetime
import html
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from ..base import workdir
from ..base.json_files import is_number
from ..config.overrides import flat
from . import curves
from .curves import Group
from .runs import Axis, Run

HELDOUT, TRAIN = "heldout/loss", "train/loss"
_AXES: dict[Axis, str] = {"step": "steps", "seconds": "training time, {unit}", "tokens": "{counted}"}
# Okabe and Ito's colours, distinct with every common colour-vision deficiency.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_POINTS = 1000  # at most of a line: more make a page of a long run slow
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1.25rem; }
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
section > div { min-width: 0; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
"""
Table = list[list[str]]  # rows of text, the headings first


def page(runs: Sequence[Run]) -> str:
    """Return the page as HTML: the state of each run, losses, results, differences, and all other measurements."""
    groups = curves.groups(runs)
    keys = sorted(set().union(*(run.keys() for run in runs)) - {HELDOUT, TRAIN})
    labels = [group.label for group in groups]
    differing = curves.differences([group.runs[0].config for group in groups]).items()
    knobs = [[name, *map(_cell, values)] for name, values in differing if name != "seed"]
    title = html.escape(", ".join(labels))
    states = [f"{run.path.resolve().name}: {state(run)}" for run in runs]
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<title>{title}</title><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body>",
        *(f"<p>{html.escape(line)}</p>" for line in states),
        _charts("Loss", [chart(groups, (HELDOUT, TRAIN), axis) for axis in _AXES]),
        _table("Results", results(runs)),
        _table("When each run reaches the worst final loss", race(groups)),
        _table("Config differences", [["knob", *labels], *knobs] if knobs else []),
        _charts("Optimizer", [chart(groups, (key,)) for key in keys if key.startswith("optimizer/")]),
        _charts("Other measurements", [chart(groups, (key,)) for key in keys if not key.startswith("optimizer/")]),
        *(f"<p>Note: {html.escape(note)}</p>" for run in runs for note in run.notes),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def state(run: Run) -> str:
    """Return whether a run is complete, stopped (and why), or running or killed (and when it measured last)."""
    if run.result is not None:
        stopped, steps = run.result["stopped"], run.result["steps"]
        return f"stopped after {steps} steps: {stopped}" if stopped else f"complete after {steps} steps"
    last = datetime.datetime.fromtimestamp((run.path / workdir.METRICS).stat().st_mtime)
    return f"running or killed; last measurement after {run.points[-1]['step']} steps, at {last:%Y-%m-%d %H:%M}"


def chart(groups: Sequence[Group], keys: Sequence[str], axis: Axis = "step") -> Figure:
    """Draw measurements of groups against an axis: a line per group and key, and a band for the range over seeds."""
    unit, seconds = "s", 1
    if axis == "seconds" and max(run.points[-1]["seconds"] for group in groups for run in group.runs) > 3 * 3600:
        unit, seconds = "hours", 3600
    measured = set().union(*(run.keys() for group in groups for run in group.runs))
    images = "throughput/examples_per_second" in measured and "throughput/tokens_per_second" not in measured
    counted = "examples" if images else "tokens"
    title = "loss" if len(keys) > 1 else html.escape(keys[0].removeprefix("optimizer/"))
    figure = Figure(layout={"template": {}, "height": 420 if len(keys) > 1 else 240, "title_text": title})
    figure.update_layout(title={"font_size": 14, "x": 0, "xref": "paper"}, margin={"l": 50, "r": 10, "t": 40, "b": 40})
    figure.update_layout(showlegend=len(keys) > 1, legend={"x": 1, "xanchor": "right", "bgcolor": "#ffffff99"})
    figure.update_xaxes(title_text=_AXES[axis].format(unit=unit, counted=counted), rangemode="tozero")
    lowest, highest = np.inf, 0.0
    for (group, colour), key in itertools.product(zip(groups, itertools.cycle(_COLOURS), strict=False), keys):
        line = curves.band(group, key, axis)
        if not len(line.x):
            continue
        shown = np.unique(np.linspace(0, len(line.x) - 1, _POINTS).astype(int))
        line = curves.Band(*(values[shown] for values in line))
        lowest, highest = min(lowest, line.low.min()), max(highest, line.high.max())
        x, style = line.x / seconds, {"mode": "lines" if len(line.x) > 1 else "markers", "marker_color": colour}
        if len(group.runs) > 1 and key != TRAIN:
            around = {"x": np.concatenate([x, x[::-1]]), "y": np.concatenate([line.high, line.low[::-1]])}
            figure.add_scatter(
                **around, fill="toself", fillcolor=colour, opacity=0.2, line_width=0, hoverinfo="skip", showlegend=False
            )
        width, dash = (1, "dot") if key == TRAIN else (2, "solid")
        name = html.escape(f"{group.label} {key}" if len(keys) > 1 else group.label)  # plotly reads names as HTML
        figure.add_scatter(x=x, y=line.mean, name=name, line={"width": width, "dash": dash, "color": colour}, **style)
    if 0 < 30 * lowest < highest:
        figure.update_yaxes(type="log")
    return figure


def results(runs: Sequence[Run]) -> Table:
    """Return one row per run: its rate and seed, and the numbers of `result.json` or else its last measurements."""
    rows = []
    for run in runs:
        knobs, last, losses = dict(flat(run.config)), run.points[-1], run.curve(HELDOUT, "step")[1]
        row = {"run": run.path.resolve().name}
        row |= {name: knobs.get(key) for name, key in (("learning rate", "schedule.learning_rate"), ("seed", "seed"))}
        so_far = {"steps": last["step"], "seconds": last["seconds"], "tokens": last["tokens"]}
        rows.append(row | (run.result or so_far | ({"heldout_loss": losses[-1]} if len(losses) else {})))
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "stopped"]
    return [[name.replace("_", " ") for name in names], *([_cell(row.get(name)) for name in names] for row in rows)]


def race(groups: Sequence[Group]) -> Table:
    """Return when each group reaches the last held-out loss of the worst one, and as which share of that one's run.

    There are no rows for fewer than two groups with a held-out loss.
    """
    bands = {group.label: {axis: curves.band(group, HELDOUT, axis) for axis in _AXES} for group in groups}
    ends = [(end, label) for label, lines in bands.items() if (end := lines["step"].end) is not None]
    if len(ends) < 2:
        return []
    target, worst = max(ends)
    rows = [[f"falls to {target:.4f}, the end of {worst}, after", "steps", "seconds", "tokens"]]
    for label, lines in bands.items():
        row = [label]
        for axis, line in lines.items():
            at, whole = curves.reach(line.x, line.mean, target), bands[worst][axis].x[-1]
            row.append("not reached" if at is None else f"{at:,.0f} ({at / whole:.0%})")
        rows.append(row)
    return rows


def _cell(value: Any) -> str:
    if not is_number(value):
        return "-" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if abs(value) >= 0.1 else f"{value:.4g}"


def _charts(title: str, figures: Sequence[Figure]) -> str:
    drawn = [
        figure.to_html(full_html=False, include_plotlyjs=False, config={"responsive": True, "displaylogo": False})
        for figure in figures
        if figure.data
    ]
    return f"<h2>{title}</h2><section>{''.join(drawn)}</section>" if drawn else ""


def _table(title: str, rows: Table) -> str:
    if not rows:
        return ""
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<h2>{title}</h2><div class="table"><table>{body}</table></div>'
