"""Draw the held-out losses of a comparison as a picture for the docs."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..framework.reporting.curves import Group, band, reach
from ..framework.reporting.runs import Axis

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def loss_figure(groups: Sequence[Group], axes: Sequence[Axis]) -> Figure:
    """Draw the held-out loss of each group against each axis: the mean over seeds, with their range.

    Marks where each group reaches the last loss of the worst one, as a share of that one's run.
    """
    figure = Figure(figsize=(min(15, 7.5 * len(axes)), 5.4), layout="constrained", dpi=144)
    panels: Sequence[Axes] = np.ravel(figure.subplots(1, len(axes), sharey=True, squeeze=False)).tolist()
    for panel, axis in zip(panels, axes, strict=True):
        lines = [band(group, "heldout/loss", axis) for group in groups]
        target, worst = max((line.end, number) for number, line in enumerate(lines) if line.end is not None)
        panel.axhline(target, color="#444444", linewidth=1, linestyle=(0, (2, 3)))
        marked = 0
        for number, (group, line) in enumerate(zip(groups, lines, strict=True)):
            colour = _COLOURS[number % len(_COLOURS)]
            label = group.label if line.end is None else f"{group.label}: {line.end:.3f} at the end"
            panel.plot(line.x, line.mean, color=colour, linewidth=2.2, label=label)
            panel.fill_between(line.x, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
            at = reach(line.x, line.mean, target)
            if number == worst or at is None:
                continue
            panel.plot(at, target, color=colour, marker="o", markersize=9, markerfacecolor="white", zorder=5)
            # The area below and left of a falling curve is free; each share gets its own line.
            share, place = f"{at / lines[worst].x[-1]:.0%}", (-7, -17 - 15 * marked)
            panel.annotate(share, (at, target), place, textcoords="offset points", ha="right", color=colour)
            marked += 1
        panel.set_xlabel({"step": "optimizer steps", "seconds": "training time (s)", "tokens": "tokens seen"}[axis])
        panel.set_xlim(left=0)
        panel.grid(color="#e8e8e8", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out loss (nats per token)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=11)
    return figure
