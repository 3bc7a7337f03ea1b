"""Draw training runs: loss against steps, time and tokens, and a small panel for each other measurement.

The gid of a line is "key|label of its group", so that drawings can be read back.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from .curves import Group, band, last, race
from .runs import Axis

HELDOUT, TRAIN = "heldout/loss", "train/loss"
_DPI = 144
# Okabe and Ito's colours, distinct with every common colour-vision deficiency; repeated with dashes.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":")


def loss_figure(groups: Sequence[Group], axes: Sequence[Axis] = ("step", "seconds", "tokens")) -> Figure:
    """Draw held-out loss (thick, with its range) and training loss (thin) against each axis."""
    figure = Figure(figsize=(min(15, 7.5 * len(axes)), 5.4), layout="constrained", dpi=_DPI)
    panels: Sequence[Axes] = np.ravel(figure.subplots(1, len(axes), sharey=True, squeeze=False)).tolist()
    styles = _styles(groups)
    for panel, axis in zip(panels, axes, strict=True):
        unit, scale = _time_unit(groups) if axis == "seconds" else ("", 1.0)
        for group in groups:
            style = styles[group.label]
            _line(panel, group, TRAIN, axis, style | {"linewidth": 0.8, "alpha": 0.45}, scale)
            _line(panel, group, HELDOUT, axis, style | {"linewidth": 2.2}, scale)
        _mark_reached(panel, groups, axis, scale)
        labels = {"step": "optimizer steps", "seconds": f"training time ({unit})", "tokens": "tokens seen"}
        panel.set_xlabel(labels[axis], fontsize=12)
        _dress(panel)
        if axis == "tokens":
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].set_ylabel("loss (nats per token)", fontsize=12)
    handles = [Line2D([], [], linewidth=2.2, label=_with_end(group), **styles[group.label]) for group in groups]
    if any(TRAIN in group.keys() for group in groups):  # noqa: SIM118  (not a mapping)
        handles.append(Line2D([], [], color="#666666", linewidth=2.2, label="held-out"))
        handles.append(Line2D([], [], color="#666666", linewidth=0.8, alpha=0.6, label="training batches"))
    _legend(figure, handles)
    return figure


def small_multiples(groups: Sequence[Group], keys: Sequence[str], prefix: str) -> Figure:
    """Draw one small panel per key against steps, titled with the key without the prefix."""
    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(15 * columns / 4 if columns > 1 else 6, 2.4 * rows + 0.6), layout="constrained", dpi=_DPI)
    panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
    styles = _styles(groups)
    measured = [group for group in groups if not set(keys).isdisjoint(group.keys())]
    for panel, key in zip(panels, keys, strict=False):
        for group in measured:
            _line(panel, group, key, "step", styles[group.label] | {"linewidth": 1.4})
        panel.set_title(key.removeprefix(prefix).replace("_", " "), fontsize=11, loc="left")
        panel.tick_params(labelsize=9)
        _dress(panel)
        _scale(panel)
    for panel in panels[max(0, len(keys) - columns) : len(keys)]:
        panel.set_xlabel("optimizer steps", fontsize=10)
    for panel in panels[len(keys) :]:
        panel.set_visible(False)
    _legend(figure, [Line2D([], [], linewidth=2, label=group.label, **styles[group.label]) for group in measured])
    return figure


def _time_unit(groups: Sequence[Group]) -> tuple[str, float]:
    """Return the unit for the longest run's training time, and its length in seconds."""
    longest = max(run.points[-1]["seconds"] for group in groups for run in group.runs)
    if longest > 3 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if longest > 600 else ("seconds", 1.0)


def _styles(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    colours = len(_COLOURS)
    return {
        group.label: {"color": _COLOURS[i % colours], "linestyle": _DASHES[i // colours % len(_DASHES)]}
        for i, group in enumerate(groups)
    }


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), 4, int(figure.get_figwidth() * 11) // (longest + 6)))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=11)


def _with_end(group: Group) -> str:
    end = last(band(group, HELDOUT, "step").mean)
    return group.label if end is None else f"{group.label}: {end:.3f} held-out at the end"


def _line(panel: Axes, group: Group, key: str, axis: Axis, style: dict[str, Any], scale: float = 1.0) -> None:
    line = band(group, key, axis)
    marker = "o" if len(line.x) == 1 else ""
    panel.plot(line.x / scale, line.mean, gid=f"{key}|{group.label}", marker=marker, **style)
    if len(group.runs) > 1 and key != TRAIN:
        panel.fill_between(line.x / scale, line.low, line.high, color=style["color"], alpha=0.2, linewidth=0)


def _mark_reached(panel: Axes, groups: Sequence[Group], axis: Axis, scale: float) -> None:
    """Mark where each group reaches the last held-out loss of the worst one, as a share of that one's run."""
    compared = race(groups, HELDOUT, axis)
    if compared is None:
        return
    panel.axhline(compared.target, color="#444444", linewidth=1, linestyle=(0, (2, 3)))
    ring = {"marker": "o", "markersize": 9, "markeredgewidth": 2, "markerfacecolor": "white", "zorder": 5}
    text = {"textcoords": "offset points", "ha": "right", "fontsize": 13, "fontweight": "bold"}
    styles = _styles(groups)
    reached = sorted((at, label) for label, at in compared.reached.items() if at is not None and label != compared.last)
    for line, (at, label) in enumerate(reached):
        spot, colour = (at / scale, compared.target), styles[label]["color"]
        panel.plot(*spot, color=colour, **ring)
        # The area below and left of a falling curve is free; each label gets its own line.
        panel.annotate(f"{at / compared.whole:.0%}", spot, (-7, -17 - 15 * line), color=colour, **text)


def _dress(panel: Axes) -> None:
    panel.set_xlim(left=0)
    panel.grid(color="#e8e8e8", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _scale(panel: Axes) -> None:
    """Use a logarithmic axis for positive values that span more than a factor of 30."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in panel.lines])
    values = values[np.isfinite(values)]
    if len(values) and 0 < 30 * values.min() < values.max():
        panel.set_yscale("log")
    else:
        panel.yaxis.set_major_formatter("{x:.4g}")
