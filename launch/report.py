"""Draw training runs: `python -m shampax.launch.report WORKDIR [WORKDIR ...] [--output=DIR]`.

Writes one page to read, `index.html`, which needs no other file and no network, and its figures as PNG files.
Runs whose configs are equal but for the seed are drawn as one curve, their mean, with their range as a band.
"""

import argparse
import base64
import dataclasses
import html
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..framework.base.errors import UserError
from ..framework.base.json_files import is_number
from ..framework.config.overrides import flat
from ..framework.reporting import curves, figures
from ..framework.reporting.runs import Axis, Run, read_run

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 78rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin-bottom: .25rem; }
h2 { font-size: 1.2rem; margin-top: 2.25rem; }
p { max-width: 60rem; color: #444; margin-top: 0; }
img { width: 100%; height: auto; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
thead th { background: #f4f4f4; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
td { max-width: 32rem; overflow: hidden; text-overflow: ellipsis; }
tbody tr:hover { background: #f6f9fc; }
.notes { color: #7a4100; }
"""


@dataclasses.dataclass(frozen=True)
class Table:
    """A heading per column, and rows of ready text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure with the name of its file and the words around it."""

    name: str
    title: str
    description: str
    figure: Figure


def summary(groups: Sequence[curves.Group]) -> Table:
    """One row per run, from `result.json` where the run has ended, else from its last measurements."""
    columns = (
        "run",
        "optimizer",
        "learning rate",
        "seed",
        "held-out loss",
        "best held-out loss",
        "bits per character",
        "steps",
        "tokens",
        "training time",
        "skipped steps",
        "clipped steps",
        "loss spikes",
        "refreshes",
        "devices",
        "parameters",
        "state",
    )
    return Table(columns, tuple(_summary_row(run) for group in groups for run in group.runs))


def race(groups: Sequence[curves.Group]) -> Table:
    """When each group reaches the held-out loss at which the worst one ended, and the share of its run.

    No rows where fewer than two groups have a held-out loss.
    """
    axes: tuple[Axis, ...] = ("step", "seconds", "tokens")
    races = [race for axis in axes if (race := curves.race(groups, figures.HELDOUT, axis)) is not None]
    if not races:
        return Table((), ())
    columns = (
        f"falls to {races[0].target:.4f}, where {races[0].last} ends, after",
        "steps",
        "seconds",
        "tokens",
    )
    return Table(columns, tuple((group.label, *(_reached(race, group.label) for race in races)) for group in groups))


def page(groups: Sequence[curves.Group], images: Sequence[tuple[Drawing, bytes]], notes: Sequence[str]) -> str:
    """The whole page as HTML, with the images (PNG bytes, the loss first) embedded."""
    heading = html.escape(", ".join(group.label for group in groups))
    lead = "Thick lines: loss on held-out examples. Thin lines: loss on the training batches, as logged."
    if any(len(group.runs) > 1 for group in groups):
        lead += " Runs that differ only in the seed are one curve: their mean, with their range."
    (loss, loss_png), *others = images
    tables = {
        "Results": summary(groups),
        "Who gets there first": race(groups),
        "Where the configs differ": _config_differences(groups),
    }
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<title>{heading}</title><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{heading}</h1><p>{lead}</p>",
        _html_image(loss, loss_png),
    ]
    for title, table in tables.items():
        if table.rows:
            parts += [f"<h2>{title}</h2>", _html_table(table)]
    for drawing, png in others:
        parts += [f"<h2>{html.escape(drawing.title)}</h2>", _html_image(drawing, png)]
    if notes:
        items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        parts.append(f'<h2>Notes</h2><ul class="notes">{items}</ul>')
    return "\n".join([*parts, "</body></html>\n"])


def report(runs: Sequence[Run], output: pathlib.Path) -> list[pathlib.Path]:
    """Write the page and its figures into the folder `output`; returns their paths, the page first.

    Raises:
      UserError: output is a file.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file; name a folder")
    groups = curves.groups(runs)
    keys = sorted(set().union(*(run.keys() for run in runs)) - {figures.HELDOUT, figures.TRAIN})
    diagnostics = [key for key in keys if key.startswith("optimizer/")]
    others = [key for key in keys if key not in diagnostics]
    drawings = [Drawing("loss.png", "Loss", "loss against steps, time and tokens", figures.loss_figure(groups))]
    if diagnostics:
        figure = figures.small_multiples(groups, diagnostics, "optimizer/")
        drawings.append(Drawing("optimizer.png", "The optimizer's diagnostics", ", ".join(diagnostics), figure))
    if others:
        figure = figures.small_multiples(groups, others, "")
        drawings.append(Drawing("training.png", "Everything else measured", ", ".join(others), figure))
    output.mkdir(parents=True, exist_ok=True)
    images = []
    for drawing in drawings:
        drawing.figure.savefig(output / drawing.name)
        images.append((drawing, (output / drawing.name).read_bytes()))
    notes = [note for run in runs for note in run.notes]
    (output / "index.html").write_text(page(groups, images, notes), encoding="utf-8")
    return [output / "index.html", *(output / drawing.name for drawing in drawings)]


def default_output(workdirs: Sequence[pathlib.Path]) -> pathlib.Path:
    """`report/` in the only workdir, or in the folder that all workdirs share.

    Raises:
      UserError: they share none.
    """
    shared = pathlib.Path(os.path.commonpath([os.path.abspath(path) for path in workdirs]))
    if shared == pathlib.Path(shared.anchor):
        raise UserError(f"the {len(workdirs)} workdirs share no folder; name one for the report: --output=DIR")
    return pathlib.Path(os.path.relpath(shared / "report"))


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code: 2 after one line about what the user gave, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m shampax.launch.report",
        description="Draw training runs: one HTML page, and its figures as PNG files.",
    )
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path, metavar="WORKDIR", help="of a training run")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        metavar="DIR",
        help="where to write (default: report/ in the workdir, or in the folder that all workdirs share)",
    )
    options = parser.parse_args(arguments)
    try:
        runs = [read_run(path) for path in options.workdirs]
        page_path, *figure_paths = report(runs, options.output or default_output(options.workdirs))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for run in runs:
        for note in run.notes:
            print(f"note: {note}")
    print(f"Runs read: {len(runs)}, with {sum(len(run.points) for run in runs)} measured steps")
    print(f"Page (one file, opens in any browser): {page_path}")
    print(f"Figures: {' '.join(map(str, figure_paths))}")
    return 0


def _summary_row(run: Run) -> tuple[str, ...]:
    last, heldout = run.points[-1], run.curve(figures.HELDOUT, "step")[1]
    bits = run.curve("heldout/bits_per_character", "step")[1]
    so_far = {
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "heldout_loss": curves.last(heldout),
        "best_heldout_loss": float(np.nanmin(heldout)) if np.isfinite(heldout).any() else None,
        "bits_per_character": curves.last(bits),
        "stopped": "not ended",
    }
    result = so_far if run.result is None else run.result
    config = dict(flat(run.config))
    return (
        run.path.resolve().name,
        str(result.get("optimizer", "-")),
        str(config.get("schedule.learning_rate", "-")),
        str(config.get("seed", "-")),
        _decimals(result["heldout_loss"]),
        _decimals(result["best_heldout_loss"]),
        _decimals(result.get("bits_per_character")),
        _count(result["steps"]),
        _count(result["tokens"]),
        f"{_count(result['seconds'])} s",
        _count(result.get("skipped_steps")),
        _count(result.get("clipped_steps")),
        _count(result.get("loss_spikes")),
        _count(result.get("refreshes")),
        _count(result.get("devices")),
        _count(result.get("parameters")),
        result["stopped"] or "complete",
    )


def _reached(race: curves.Race, label: str) -> str:
    at = race.reached[label]
    return "not reached" if at is None else f"{_count(at)} ({at / race.whole:.0%})"


def _config_differences(groups: Sequence[curves.Group]) -> Table:
    rows = curves.differences([group.runs[0].config for group in groups])
    return Table(
        ("knob", *(group.label for group in groups)),
        tuple(
            (name, *("-" if value is None else str(value) for value in row))
            for name, row in rows.items()
            if name != "seed"
        ),
    )


def _count(value: Any) -> str:
    return f"{value:,.0f}" if is_number(value) else "-"


def _decimals(value: Any) -> str:
    return f"{value:.4f}" if is_number(value) else "-"


def _html_image(drawing: Drawing, png: bytes) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{html.escape(drawing.description)}" src="data:image/png;base64,{data}">'


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
