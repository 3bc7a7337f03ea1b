"""Draw training runs: `python -m shampax.launch.report WORKDIR [WORKDIR ...] [--output=DIR]`.

Writes a page, `index.html`, which needs no other file and no network, and its figures as PNG files. Runs whose configs
are equal except for the seed are drawn as one curve, their mean, with their range as a band.

Exit codes: 0; 2, invalid input.
"""

import base64
import html
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..framework.base.errors import UserError
from ..framework.base.json_files import is_number
from ..framework.config.overrides import flat
from ..framework.reporting import curves, figures
from ..framework.reporting.runs import Axis, Run, read_run
from . import flags

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 78rem; margin: 2rem auto; padding: 0 1.25rem; }
h1, h2 { font-size: 1.3rem; margin-top: 2rem; }
img { width: 100%; height: auto; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
"""

# (heading, key in result.json or config.json, decimals) of the summary
_COLUMNS = (
    ("run", "run", 0),
    ("optimizer", "optimizer", 0),
    ("learning rate", "schedule.learning_rate", None),
    ("seed", "seed", None),
    ("held-out loss", "heldout_loss", 4),
    ("best held-out loss", "best_heldout_loss", 4),
    ("bits per character", "bits_per_character", 4),
    ("steps", "steps", 0),
    ("tokens", "tokens", 0),
    ("training time, s", "seconds", 0),
    ("skipped steps", "skipped_steps", 0),
    ("clipped steps", "clipped_steps", 0),
    ("loss spikes", "loss_spikes", 0),
    ("refreshes", "refreshes", 0),
    ("devices", "devices", 0),
    ("parameters", "parameters", 0),
    ("state", "stopped", 0),
)


class Table(NamedTuple):
    """A heading per column, and rows of text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code. `arguments` defaults to those of this process."""
    return flags.run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = flags.Parser("report", __doc__)
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path, metavar="WORKDIR", help="workdir of a training run")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        metavar="DIR",
        help="where to write (default: report/ in the workdir, or in the folder that all workdirs share)",
    )
    options, _ = parser.parse(arguments)
    runs = [read_run(path) for path in options.workdirs]
    page_path, *figure_paths = report(runs, options.output or default_output(options.workdirs))
    for run in runs:
        for note in run.notes:
            print(f"note: {note}")
    print(f"Runs read: {len(runs)}, with {sum(len(run.points) for run in runs)} measured steps")
    print(f"Page (one file, opens in any browser): {page_path}")
    print(f"Figures: {' '.join(map(str, figure_paths))}")
    return 0


def default_output(workdirs: Sequence[pathlib.Path]) -> pathlib.Path:
    """Return `report/` in the only workdir, or in the folder that all workdirs share.

    Raises:
      UserError: they share none.
    """
    shared = pathlib.Path(os.path.commonpath([os.path.abspath(path) for path in workdirs]))
    if shared == pathlib.Path(shared.anchor):
        raise UserError(f"the {len(workdirs)} workdirs share no folder. Name one for the report: --output=DIR.")
    return pathlib.Path(os.path.relpath(shared / "report"))


def report(runs: Sequence[Run], output: pathlib.Path) -> list[pathlib.Path]:
    """Write the page and its figures to the folder `output`, and return their paths, the page first.

    Raises:
      UserError: output is a file.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output}: a file. Name a folder.")
    groups = curves.groups(runs)
    keys = sorted(set().union(*(run.keys() for run in runs)) - {figures.HELDOUT, figures.TRAIN})
    diagnostics = [key for key in keys if key.startswith("optimizer/")]
    others = [key for key in keys if key not in diagnostics]
    drawings = [("Loss", "loss.png", figures.loss_figure(groups))]
    if diagnostics:
        drawn = figures.small_multiples(groups, diagnostics, "optimizer/")
        drawings.append(("Optimizer diagnostics", "optimizer.png", drawn))
    if others:
        drawings.append(("Other measurements", "training.png", figures.small_multiples(groups, others, "")))
    output.mkdir(parents=True, exist_ok=True)
    images = {}
    for title, name, figure in drawings:
        figure.savefig(output / name)
        images[title] = (output / name).read_bytes()
    notes = [note for run in runs for note in run.notes]
    (output / "index.html").write_text(page(groups, images, notes), encoding="utf-8")
    return [output / "index.html", *(output / name for _, name, _ in drawings)]


def page(groups: Sequence[curves.Group], images: dict[str, bytes], notes: Sequence[str]) -> str:
    """Return the page as HTML with embedded images (PNG bytes by title, the loss first)."""
    heading = html.escape(", ".join(group.label for group in groups))
    lead = "Thick lines: loss on held-out examples. Thin lines: loss on the training batches, as logged."
    if any(len(group.runs) > 1 for group in groups):
        lead += " Runs that differ only in the seed are one curve: their mean, with their range."
    (loss, loss_png), *others = images.items()
    tables = {
        "Results": summary(groups),
        "Time to the worst run's final loss": race(groups),
        "Config differences": _config_differences(groups),
    }
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<title>{heading}</title><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{heading}</h1><p>{lead}</p>{_html_image(loss, loss_png)}",
        *(f"<h2>{title}</h2>{_html_table(table)}" for title, table in tables.items() if table.rows),
        *(f"<h2>{title}</h2>{_html_image(title, png)}" for title, png in others),
    ]
    if notes:
        items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        parts.append(f"<h2>Notes</h2><ul>{items}</ul>")
    return "\n".join([*parts, "</body></html>\n"])


def summary(groups: Sequence[curves.Group]) -> Table:
    """Return one row per run, from `result.json` if the run has ended, else from its last measurements."""
    rows = []
    for run in (run for group in groups for run in group.runs):
        values = dict(flat(run.config)) | {"run": run.path.resolve().name} | (run.result or _so_far(run))
        values["stopped"] = values["stopped"] or "complete"
        rows.append(tuple(_cell(values.get(key), decimals) for _, key, decimals in _COLUMNS))
    return Table(tuple(heading for heading, _, _ in _COLUMNS), tuple(rows))


def race(groups: Sequence[curves.Group]) -> Table:
    """Return when each group reaches the last held-out loss of the worst one, and as which share of that one's run.

    There are no rows for fewer than two groups with a held-out loss.
    """
    axes: tuple[Axis, ...] = ("step", "seconds", "tokens")
    races = [race for axis in axes if (race := curves.race(groups, figures.HELDOUT, axis)) is not None]
    if not races:
        return Table((), ())
    columns = (f"falls to {races[0].target:.4f}, the end of {races[0].last}, after", "steps", "seconds", "tokens")
    return Table(columns, tuple((group.label, *(_reached(race, group.label) for race in races)) for group in groups))


def _so_far(run: Run) -> dict[str, Any]:
    """Return the entries of `result.json` that the measurements tell."""
    last, heldout = run.points[-1], run.curve(figures.HELDOUT, "step")[1]
    return {
        **{key: last[axis] for key, axis in (("steps", "step"), ("tokens", "tokens"), ("seconds", "seconds"))},
        "heldout_loss": curves.last(heldout),
        "best_heldout_loss": float(np.nanmin(heldout)) if np.isfinite(heldout).any() else None,
        "bits_per_character": curves.last(run.curve("heldout/bits_per_character", "step")[1]),
        "stopped": "not ended",
    }


def _reached(race: curves.Race, label: str) -> str:
    at = race.reached[label]
    return "not reached" if at is None else f"{at:,.0f} ({at / race.whole:.0%})"


def _config_differences(groups: Sequence[curves.Group]) -> Table:
    rows = curves.differences([group.runs[0].config for group in groups])
    cells = ((name, *(_cell(value, None) for value in row)) for name, row in rows.items() if name != "seed")
    return Table(("knob", *(group.label for group in groups)), tuple(cells))


def _cell(value: Any, decimals: int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.{decimals}f}" if decimals is not None and is_number(value) else str(value)


def _html_image(title: str, png: bytes) -> str:
    return f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


if __name__ == "__main__":
    sys.exit(main())
