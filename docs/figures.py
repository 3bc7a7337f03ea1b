"""Draw the figures that explain: the lives of a step and of a block, a valley, owners of blocks, rates, workloads.

    python docs/figures.py [--png] [FOLDER]

Writes step.svg, block.svg, valley.svg, owners.svg, rates.svg and workloads.svg to FOLDER, by default docs/images.
"""

import argparse
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

HOST, DEVICE, OTHER, NETWORK = "#d9e8f6", "#fbe3c8", "#eeeeee", "#dcefdc"
ORDER, ANSWER = "#1f4e79", "#2e7d32"  # arrows: work handed to the device, numbers read back
STYLE = {
    "svg.fonttype": "none",  # text stays text: small files that can be searched
    "svg.hashsalt": "shampax",  # the same script writes the same bytes
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
}


def step() -> Figure:
    """Draw host and device during two steps and a pause."""
    figure, axes = _canvas(13.6, 4.9)
    host, device, height = 2.9, 0.9, 0.9
    for name, bottom in (("host", host), ("device", device)):
        axes.text(0.1, bottom + height / 2, name, va="center", weight="bold")
    host_row = (
        (1.2, 0.9, "batch\nt", HOST),
        (2.1, 1.0, "dispatch\nt", HOST),
        (3.1, 1.3, "read metrics\nof t - 1", HOST),
        (4.4, 0.9, "batch\nt + 1", HOST),
        (5.3, 1.0, "dispatch\nt + 1", HOST),
        (6.3, 1.3, "read metrics\nof t", HOST),
        (7.6, 2.8, "read metrics\nof t + 1", HOST),
        (10.4, 0.7, "save", OTHER),
        (11.1, 0.9, "evaluate", OTHER),
        (12.0, 0.7, "judge", OTHER),
        (12.7, 0.8, "profile", OTHER),
    )
    device_row = (
        (1.2, 1.9, "step t - 1", DEVICE),
        (3.3, 1.2, "loss and\ngradient", DEVICE),
        (4.5, 0.8, "guard", DEVICE),
        (5.3, 1.1, "optimizer", DEVICE),
        (6.6, 1.2, "loss and\ngradient", DEVICE),
        (7.8, 0.8, "guard", DEVICE),
        (8.6, 1.1, "optimizer", DEVICE),
        (11.1, 0.9, "held-out\nbatches", OTHER),
    )
    for bottom, row in ((host, host_row), (device, device_row)):
        for left, width, text, colour in row:
            _box(axes, left, bottom, width, height, text, colour)
    low, high = device + height, host
    for start, end in ((2.6, 3.35), (5.8, 6.65), (11.4, 11.4)):
        _arrow(axes, (start, high), (end, low), ORDER)
    for start, end in ((3.05, 3.75), (6.35, 6.95), (9.65, 10.0), (11.7, 11.7)):
        _arrow(axes, (start, low), (end, high), ANSWER)
    for left, name in ((3.3, "step t"), (6.6, "step t + 1")):
        axes.plot([left, left, left + 3.1, left + 3.1], [0.78, 0.68, 0.68, 0.78], color="#555555", linewidth=0.8)
        axes.text(left + 1.55, 0.45, f"{name}: one compiled program", ha="center", va="center")
    axes.plot([10.4, 10.4, 13.5, 13.5], [3.92, 4.02, 4.02, 3.92], color="#555555", linewidth=0.8)
    axes.text(11.95, 4.25, "hooks, at a pause", ha="center", va="center")
    axes.text(1.2, 4.6, "The host dispatches a step before it reads the metrics of the previous step.", va="center")
    axes.text(1.2, 4.25, "Before a pause it reads all of them.", va="center")
    axes.annotate("", (13.5, 0.1), (1.2, 0.1), arrowprops={"arrowstyle": "->", "color": "#555555", "linewidth": 0.8})
    axes.text(0.1, 0.1, "time", va="center")
    return figure


def block() -> Figure:
    """Draw the way of a gradient to the owner of a block, and of the update back."""
    figure, axes = _canvas(13.6, 5.2)
    top, middle, bottom, height = 3.9, 2.0, 0.3, 0.95
    axes.text(0.1, top + height / 2, "devices that\nhold the matrix", va="center", weight="bold")
    axes.text(0.1, (middle + bottom + height) / 2, "owner of\nthe block", va="center", weight="bold")
    axes.plot([0.1, 13.5], [3.44, 3.44], color="#999999", linewidth=0.8, linestyle=(0, (4, 4)), zorder=0)
    for left, low, width, text, colour in (
        (2.0, top, 2.1, "gradient, sharded\nlike the matrix", DEVICE),
        (4.6, top, 2.1, "tiles: a block's\npart of a shard", DEVICE),
        (4.6, middle, 2.1, "gradient G of the\nblock, momentum M", DEVICE),
        (7.2, middle, 2.1, "direction\nroot(L) M root(R)", DEVICE),
        (9.8, middle, 1.7, "scaled to the\ngraft's norm", DEVICE),
        (4.6, bottom, 2.1, "statistics L, R:\naverages of GG', G'G", DEVICE),
        (7.2, bottom, 2.1, "if the block is due:\nnew roots of L and R", DEVICE),
        (9.8, top, 1.7, "tiles joined\nto shards", DEVICE),
        (11.8, top, 1.7, "update of\nthe matrix", DEVICE),
        (5.05, 3.27, 1.2, "all-to-all", NETWORK),
        (10.05, 3.27, 1.2, "all-to-all", NETWORK),
    ):
        _box(axes, left, low, width, 0.34 if colour == NETWORK else height, text, colour)
    row = {name: low + height / 2 for name, low in (("top", top), ("middle", middle), ("bottom", bottom))}
    for start, end in (
        ((4.1, row["top"]), (4.6, row["top"])),
        ((5.65, top), (5.65, 3.61)),
        ((5.65, 3.27), (5.65, middle + height)),
        ((6.7, row["middle"]), (7.2, row["middle"])),
        ((5.65, middle), (5.65, bottom + height)),
        ((6.7, row["bottom"]), (7.2, row["bottom"])),
        ((9.3, row["middle"]), (9.8, row["middle"])),
        ((10.65, middle + height), (10.65, 3.27)),
        ((10.65, 3.61), (10.65, top)),
        ((11.5, row["top"]), (11.8, row["top"])),
    ):
        _arrow(axes, start, end, ORDER)
    _arrow(axes, (8.25, bottom + height), (8.25, middle), ANSWER)
    axes.text(8.4, (middle + bottom + height) / 2, "used from the next step on", va="center")
    return figure


def valley() -> Figure:
    """Draw gradient descent, Adam and Shampoo on a quadratic function whose axes are turned by 40 degrees."""
    turn = np.deg2rad(40)
    basis = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    hessian = basis @ np.diag([0.02, 1.0]) @ basis.T
    side = np.linspace(-4.3, 4.3, 60)
    grid = np.stack(np.meshgrid(side, side), -1)
    height = np.einsum("...i,ij,...j->...", grid, hessian, grid) / 2
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    for panel, (title, path) in zip(figure.subplots(1, 3), _paths(hessian).items(), strict=True):
        panel.contour(side, side, height, levels=np.geomspace(0.02, 6, 9), colors="#bbbbbb", linewidths=0.8)
        panel.plot(*path.T, color=ORDER, marker="o", markersize=3, linewidth=1)
        panel.plot(0, 0, marker="*", markersize=11, color=ANSWER)
        panel.set_title(title, fontsize=10)
        panel.set_aspect("equal")
        panel.set_xticks([])
        panel.set_yticks([])
    return figure


def _paths(hessian: np.ndarray) -> dict[str, np.ndarray]:
    """Return title -> points [13, 2] of 12 steps by each method.

    Statistics are those of gradients that vary as much as the function is steep. Steps of Adam and Shampoo are equally
    long.
    """
    values, vectors = np.linalg.eigh(hessian)
    methods = {
        "gradient descent": 1.6 * np.eye(2),
        "Adam: scales each number": np.diag(np.diag(hessian) ** -0.5),
        "Shampoo: scales all directions": vectors @ np.diag(values**-0.5) @ vectors.T,
    }
    result = {name: [np.array([-3.9, -1.9])] for name in methods}
    for step in range(12):
        for name, scale in methods.items():
            update = scale @ hessian @ result[name][-1]
            if "scales" in name:
                update *= 0.8 * (1 - step / 14) / np.linalg.norm(update)
            result[name].append(result[name][-1] - update)
    return {name: np.array(points) for name, points in result.items()}


def owners() -> Figure:
    """Draw two matrices in blocks, their owners, and what an owner keeps of a block."""
    figure, axes = _canvas(13.6, 4.6)
    colours = ("#d9e8f6", "#fbe3c8", "#dcefdc", "#eadcf0")
    matrices = ((0.2, 2.3, 4, 2, 0.75), (0.2, 0.2, 2, 2, 0.75))
    axes.text(0.2, 4.05, "parameters, cut into blocks", va="center", weight="bold")
    axes.text(5.2, 4.05, "each device owns its share", va="center", weight="bold")
    axes.text(9.4, 4.05, "and keeps of each of its blocks", va="center", weight="bold")
    number = 0
    for left, bottom, columns, rows, size in matrices:
        for row in range(rows):
            for column in range(columns):
                low = bottom + size * (rows - 1 - row)
                _box(axes, left + size * column, low, size, size, str(number), colours[number % 4])
                number += 1
    for device, colour in enumerate(colours):
        bottom = 3.05 - 0.92 * device
        axes.text(5.2, bottom + 0.3, f"device {device}", va="center")
        for place, block in enumerate(range(device, number, 4)):
            _box(axes, 6.6 + 0.68 * place, bottom, 0.6, 0.6, str(block), colour)
    for left, bottom, width, height, text in (
        (9.4, 2.35, 1.0, 1.2, "M"),
        (11.2, 2.35, 1.2, 1.2, "L"),
        (12.5, 2.55, 1.0, 1.0, "R"),
        (11.2, 0.6, 1.2, 1.2, "root\nof L"),
        (12.5, 0.8, 1.0, 1.0, "root\nof R"),
        (9.4, 0.6, 1.0, 1.2, "update"),
    ):
        _box(axes, left, bottom, width, height, text, colours[0])
    axes.text(9.9, 2.12, "momentum", ha="center", va="center")
    axes.text(12.35, 2.12, "statistics, every step", ha="center", va="center")
    axes.text(12.35, 0.37, "roots, every 20 steps", ha="center", va="center")
    axes.text(9.9, 0.37, "root(L) M root(R)", ha="center", va="center")
    _arrow(axes, (3.5, 2.2), (5.0, 2.2), ORDER)
    _arrow(axes, (8.65, 2.2), (9.3, 2.2), ORDER)
    _arrow(axes, (11.2, 1.2), (10.4, 1.2), ANSWER)
    return figure


def rates() -> Figure:
    """Draw the losses by learning rate in the tables of optimizer.md, for models of several widths."""
    rows = re.findall(
        r"^\| (width|\d+)[^|]*((?:\| [*\d.]+ )+)\|", (Path(__file__).parent / "optimizer.md").read_text(), re.M
    )
    numbers = [(name, [float(x) for x in re.findall(r"\d+\.\d+", cells)]) for name, cells in rows]
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    panels = iter(figure.subplots(1, 2, sharey=True))
    for name, values in numbers:
        if name == "width":
            panel, x = next(panels), values
            panel.set_xscale("log", base=2)
            panel.set_xticks(x, [f"{each:g}" for each in x], minor=False)
            panel.set_xlabel("learning rate")
            panel.grid(color="#e8e8e8", linewidth=0.8)
            panel.spines[["top", "right"]].set_visible(False)
            continue
        losses = values[: len(x)]
        panel.plot(x, losses, marker="o", markersize=4, label=f"width {name}")
        panel.plot(
            x[int(np.argmin(losses))], min(losses), marker="o", markersize=10, markerfacecolor="none", color=ORDER
        )
    first, second = figure.axes
    first.set_title("one rate for all parameters", fontsize=10)
    second.set_title("with wider = width / 64", fontsize=10)
    first.set_ylabel("held-out loss (nats a byte)")
    second.legend(frameon=False)
    return figure


def workloads() -> Figure:
    """Draw the shares of the baseline's steps in the table of results/workloads.md, a point for each seed."""
    page = (Path(__file__).parent / "results" / "workloads.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ steps \| ([\d %,]+)", page, re.MULTILINE)
    figure = Figure(figsize=(9.6, 2.4), layout="constrained")
    panel = figure.subplots()
    for row, (_, baseline, shares) in enumerate(reversed(rows)):
        panel.barh(row, 100, height=0.5, color=OTHER)
        points = [int(each) for each in re.findall(r"\d+", shares)]
        panel.plot(points, [row] * len(points), "o", color=ORDER)
        panel.text(101, row, baseline, va="center")
    panel.set_yticks(range(len(rows)), [workload for workload, _, _ in reversed(rows)])
    panel.set_xlim(0, 128)
    panel.set_xticks(range(0, 101, 20))
    panel.set_xlabel("steps until the baseline's final value, % of the baseline's")
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width * 0.72, height * 0.72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(-0.1, height)
    axes.axis("off")
    return figure, axes


def _box(axes: Axes, left: float, bottom: float, width: float, height: float, text: str, colour: str) -> None:
    axes.add_patch(Rectangle((left, bottom), width, height, facecolor=colour, edgecolor="#555555", linewidth=0.8))
    axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center")


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, shrinkA=0, shrinkB=0))


def write(folder: Path, kind: str = "svg") -> list[Path]:
    """Write all figures and return their paths."""
    written = []
    with mpl.rc_context(STYLE):
        for draw in (step, block, valley, owners, rates, workloads):
            path = folder / f"{draw.__name__}.{kind}"
            metadata = {"Date": None, "Creator": None} if kind == "svg" else {}
            draw().savefig(path, metadata=metadata, dpi=110, facecolor="white")
            written.append(path)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "images", metavar="FOLDER")
    parser.add_argument("--png", action="store_true", help="write PNG files instead")
    options = parser.parse_args()
    print(*write(options.folder, "png" if options.png else "svg"), sep="\n")
