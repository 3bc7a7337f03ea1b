"""Train a config with one setting of our Shampoo changed at a time, to see which settings matter.

    python -m shampax.benchmarks.tuning learn --config=shampax/configs/lm.py:bytes
    python -m shampax.benchmarks.tuning table --markdown=docs/tuning.md --figure=docs/images/tuning.png

learn starts from the config's own rate and options, for one seed by default. Each run is a file in the workdir; rerun
the same command to resume. table reports all tasks in the workdir. JSON goes to standard output, progress to standard
error.
"""

import argparse
import dataclasses
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..framework.base import workdir
from ..framework.base.errors import UserError
from ..framework.config.check import load
from . import command, figure, learning
from .documents import Section, table, write
from .optimizers import folder_of
from .outcomes import Outcome, by, mean
from .trials import Trial

COMMAND = "python -m shampax.benchmarks.tuning"
SECTION = Section("tuning")
BASE, CHANGED = "base", "changed"
RATE_FACTORS = (0.25, 0.5, 2.0, 4.0)
CHANGES: dict[str, Sequence[Any]] = {
    "momentum": (0.7, 0.8, 0.9, 0.95),
    "nesterov": (False, True),
    "beta2": (0.9, 0.95, 0.98, 0.99),
    "diagonal_rate": (0.5, 1.0, 2.0, 4.0),
    "interval": (10, 20, 50),
    "ridge": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
    "exponent": (0.25, 0.5, 1.0),
    "graft": ("adam", "adam_normalized", "rmsprop"),
    "block_size": (32, 64, 128),
    "orthogonalize": (0, 1, 3, 5),
    "roots_dtype": ("float32", "bfloat16"),
}


def trials(base: Trial, own: dict[str, Any], options: Sequence[str]) -> list[Trial]:
    """Return the base and one trial for each value of an option that differs from the base's `own`."""
    changed = dataclasses.replace(base, variant=CHANGED)
    rates = [{"rate": own["rate"] * factor} for factor in RATE_FACTORS] if "rate" in options else []
    others = [{name: value} for name in options for value in CHANGES.get(name, ()) if value != own[name]]
    return [base, *(changed.but(**change) for change in rates + others)]


def learn(options: argparse.Namespace) -> dict[str, Any]:
    """Train the missing runs."""
    config = load(options.config, options.set)
    workload = learning.Workload(config, options.workdir / workdir.CACHE)
    ours, folder = workload.configured, folder_of(options.workdir, options.config, workload)
    base = {"rate": config.schedule.learning_rate, "momentum": ours.beta1, "nesterov": ours.nesterov}
    programs: dict[Any, learning.Program] = {}
    for seed in options.seeds:
        for trial in trials(Trial.of(BASE, seed, **base), vars(ours) | base, options.options):
            learning.run(workload, trial, folder, programs)
    return {"base": base}


def compare(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return one row per option, that with the largest effect first: its `base` value, and mean `losses` by value.

    A value with a diverged run has an infinite loss.

    Raises:
      UserError: the base is missing.
    """
    of_base = [outcome for outcome in outcomes if outcome.trial.variant == BASE]
    if not of_base:
        raise UserError("--workdir: the run without a change is missing. Run the sub-command learn again")
    base = dict(of_base[0].trial.settings)
    own = of_base[0].run.config["optimizer"] | base
    losses: dict[str, dict[Any, float]] = {}
    for settings, runs in by(outcomes, lambda outcome: outcome.trial.settings).items():
        for name, value in settings:
            if base.get(name) != value:
                loss = mean(runs) if all(run.complete for run in runs) else math.inf
                losses.setdefault(name, {own[name]: mean(of_base)})[value] = loss
    rows = [
        {"option": name, "base": own[name], "losses": {value: of[value] for value in sorted(of)}}
        for name, of in losses.items()
    ]
    return sorted(rows, key=lambda row: min(row["losses"].values()) - max(row["losses"].values()))


def tabulate(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the runs in the workdir. Write tables into --markdown or to standard error; draw the first."""
    tasks = {path.name: learning.read(path) for path in sorted(options.workdir.glob("*.py:*"))}
    rows = {title: compare(outcomes) for title, outcomes in tasks.items() if outcomes}
    if not rows:
        raise UserError(f"--workdir={options.workdir}: it has no runs to compare. Run the sub-command learn first")
    parts = ["## One setting at a time"]
    if options.markdown and options.figure:
        link = os.path.relpath(options.figure, options.markdown.parent)
        parts.append(f"![Held-out loss by the value of each setting; the config's own in orange]({link})")
    parts.append(f"Made by `{COMMAND} table`. Final held-out loss, nats per token; the config's own value is bold.")
    for title, of_task in rows.items():
        body = [
            [
                f"`{row['option']}`",
                ", ".join(
                    f"**{value}: {loss:.4f}**" if value == row["base"] else f"{value}: {loss:.4f}"
                    for value, loss in row["losses"].items()
                ),
            ]
            for row in of_task
        ]
        parts.append(f"**{title}**\n\n{table(['option', 'value: loss'], body)}")
    text = "\n\n".join(parts) + "\n"
    if options.markdown:
        write(options.markdown, {SECTION: text})
    else:
        print(text, file=sys.stderr)
    if options.figure:
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        figure.tuning_figure(next(iter(rows.values()))).savefig(options.figure)
    return rows


def main(arguments: Sequence[str]) -> int:
    """Run the command line. Return the exit code."""
    parser, verb, tabulated = command.learn_and_table(
        COMMAND, "Train with one setting changed at a time.", learn, tabulate, Path("runs/tuning")
    )
    verb.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0])
    verb.add_argument(
        "--options", type=lambda text: text.split(","), default=["rate", *CHANGES], help="default: rate and all others"
    )
    tabulated.add_argument("--figure", type=Path, metavar="PNG", help="draw the losses of the first task by value")
    options = parser.parse_args(arguments)
    return command.report(lambda: options.run(options))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
