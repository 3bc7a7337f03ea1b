"""Draw held-out losses as pictures for the docs: of a comparison, and of one setting changed at a time."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..framework.reporting.curves import Group, band, reach

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def loss_figure(tasks: Mapping[str, Sequence[Group]]) -> Figure:
    """Draw the held-out loss of each task's groups against steps: the mean over seeds, with their range.

    Marks where each group reaches the last loss of the worst one, as a share of that one's run. A group has one colour
    in all panels. `tasks` has the groups by title.
    """
    columns = 2 if len(tasks) == 4 else min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(6 * columns, 0.5 + 4.4 * rows), layout="constrained", dpi=110)
    panels: Sequence[Axes] = np.ravel(figure.subplots(rows, columns, squeeze=False)).tolist()
    for panel in panels[len(tasks) :]:
        panel.remove()
    labels = list(dict.fromkeys(group.label for groups in tasks.values() for group in groups))
    handles = {}
    for panel, (title, groups) in zip(panels, tasks.items(), strict=False):
        lines = [band(group, "heldout/loss", "step") for group in groups]
        target, worst = max((line.end, number) for number, line in enumerate(lines) if line.end is not None)
        panel.axhline(target, color="#444444", linewidth=1, linestyle=(0, (2, 3)))
        for number, (group, line) in enumerate(zip(groups, lines, strict=True)):
            colour = _COLOURS[labels.index(group.label) % len(_COLOURS)]
            handles[group.label] = panel.plot(line.x, line.mean, color=colour, linewidth=2)[0]
            panel.fill_between(line.x, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
            at = reach(line.x, line.mean, target)
            if number == worst or at is None:
                continue
            panel.plot(at, target, color=colour, marker="o", markersize=8, markerfacecolor="white", zorder=5)
        # The first part of a curve is the same for all and hides the differences.
        ends = [line.mean[len(line.mean) // 4] for line in lines if len(line.mean)]
        panel.set_ylim(min(line.end for line in lines if line.end is not None) - 0.05, max(ends))
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("optimizer steps")
        panel.set_xlim(left=0)
        panel.grid(color="#e8e8e8", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out loss (nats)")
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=4, frameon=False, fontsize=11)
    return figure


def tuning_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the loss against the values of each numerical option, with the base marked.

    `rows` have an option's name, its base value and its losses by value. Values are evenly spaced.
    """
    numeric = [row for row in rows if not isinstance(row["base"], str | bool)]
    columns = min(3, len(numeric))
    figure = Figure(figsize=(3.4 * columns, 2.4 * -(-len(numeric) // columns)), layout="constrained", dpi=110)
    panels: Sequence[Axes] = np.ravel(figure.subplots(-(-len(numeric) // columns), columns, sharey=True)).tolist()
    for panel in panels[len(numeric) :]:
        panel.remove()
    for panel, row in zip(panels, numeric, strict=False):
        values = [value for value, loss in row["losses"].items() if np.isfinite(loss)]
        places = range(len(values))
        panel.plot(places, [row["losses"][value] for value in values], color=_COLOURS[0], marker="o", markersize=4)
        base = values.index(row["base"])
        panel.plot(base, row["losses"][row["base"]], color=_COLOURS[1], marker="o", markersize=8)
        panel.set_xticks(places, [f"{value:g}" for value in values])
        panel.set_title(row["option"], fontsize=10)
        panel.grid(color="#e8e8e8", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out loss (nats)")
    return figure
