"""Train the sample of configs/lm.py with one Shampoo option changed at a time, to choose the defaults.

    python -m shampax.benchmarks.defaults learn
    python -m shampax.benchmarks.defaults table --markdown=docs/results.md

Every change is trained with the same learning rates and seeds as the unchanged options. Each run is a file in the
workdir; rerun the same command to resume. JSON goes to standard output, progress to standard error.
"""

import argparse
import dataclasses
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..framework.base import workdir
from ..framework.base.errors import UserError
from ..framework.config.check import load
from ..optimizers import ShampooOptions
from . import command, learning
from .documents import Section, table, write
from .grid import Outcome, Trial, by, mean

COMMAND = "python -m shampax.benchmarks.defaults"
SECTION = Section("defaults")
UNCHANGED = "defaults"
CHANGES: dict[str, dict[str, Any]] = {
    UNCHANGED: {},
    "exponent 0.25": {"exponent": 0.25},
    "exponent 0.333": {"exponent": 1 / 3},
    "exponent 1": {"exponent": 1.0},
    "ridge 1e-6": {"ridge": 1e-6},
    "ridge 1e-5": {"ridge": 1e-5},
    "ridge 1e-3": {"ridge": 1e-3},
    "cut 1e-6": {"ridge": 0.0, "cut": 1e-6, "solver": "eigh"},
    "cut 1e-4": {"ridge": 0.0, "cut": 1e-4, "solver": "eigh"},
    "graft rmsprop": {"graft": "rmsprop"},
    "graft rmsprop_normalized": {"graft": "rmsprop_normalized"},
    "graft adam_normalized": {"graft": "adam_normalized"},
    "beta2 0.95": {"beta2": 0.95},
    "beta2 0.999": {"beta2": 0.999},
    "beta1 0.8": {"beta1": 0.8},
    "beta1 0.95": {"beta1": 0.95},
    "nesterov": {"nesterov": True},
    "beta1 0.95, nesterov": {"beta1": 0.95, "nesterov": True},
    "interval 5": {"interval": 5},
    "interval 20": {"interval": 20},
    "no early intervals": {"early_intervals": ()},
}


def trials(options: argparse.Namespace) -> list[Trial]:
    """Return the grid, ordered by seed.

    Raises:
      UserError: a change is unknown.
    """
    unknown = [name for name in options.changes if name not in CHANGES]
    if unknown:
        raise UserError(f"--changes={unknown[0]}: unknown change. Choose from: {'; '.join(CHANGES)}")
    return [Trial(name, rate, seed) for seed in options.seeds for name in options.changes for rate in options.rates]


def variants(ours: ShampooOptions) -> dict[str, ShampooOptions]:
    """Return the sample's options with the default momentum, once for every change."""
    unchanged = dataclasses.replace(ours, beta1=ShampooOptions.beta1)
    return {name: dataclasses.replace(unchanged, **change) for name, change in CHANGES.items()}


def learn(options: argparse.Namespace) -> dict[str, Any]:
    """Train the runs that are missing in the workdir. Return a summary of all runs."""
    workload = learning.Workload(load("shampax/configs/lm.py:sample"), options.workdir / workdir.CACHE)
    workload.options = variants(workload.options["ours"])
    programs: dict[str, learning.Program] = {}

    def run(trial: Trial) -> dict[str, Any]:
        if trial.variant not in programs:
            programs.clear()  # trials come grouped by variant: free the previous program
            programs[trial.variant] = workload.program(workload.options[trial.variant])
        return learning.train(workload, programs[trial.variant], trial)

    results = learning.run_grid(
        trials(options), options.workdir / "learn", lambda trial: learning.settings_of(workload, trial), run
    )
    return {
        "runs": [
            {name: result[name] for name in ("variant", "learning_rate", "seed", "steps", "stopped")}
            | {"heldout_loss": result["heldout"][-1]["loss"]}
            for result in results
        ]
    }


def compare(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return one row per change, best first: mean loss of each rate over seeds, the lowest of them, and its difference.

    The difference is to the lowest mean of the unchanged options over the same seeds.
    """
    cells = by(outcomes, lambda outcome: (outcome.trial.variant, outcome.trial.seed, outcome.trial.learning_rate))
    rates = sorted({rate for _, _, rate in cells})

    def means(name: str, seeds: Sequence[int]) -> dict[float, float]:
        runs = {rate: [run for seed in seeds for run in cells.get((name, seed, rate), [])] for rate in rates}
        return {rate: mean(r) for rate, r in runs.items() if len(r) == len(seeds) and all(run.complete for run in r)}

    rows = []
    for name in dict.fromkeys(name for name, _, _ in cells):
        seeds = sorted({seed for other, seed, _ in cells if other == name})
        own, base = means(name, seeds), means(UNCHANGED, seeds)
        if own and base:
            best = min(own.values())
            rows.append(
                {
                    "change": name,
                    "seeds": len(seeds),
                    "by_rate": {f"{rate:g}": loss for rate, loss in own.items()},
                    "best": best,
                    "behind_defaults": best - min(base.values()),
                }
            )
    return sorted(rows, key=lambda row: row["behind_defaults"])


def tabulate(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the runs in the workdir. Write the table into the --markdown file or to standard error."""
    outcomes, missing = learning.read_grid(trials(options), options.workdir / "learn", {})
    rows = compare(outcomes)
    if not rows:
        raise UserError(f"--workdir={options.workdir}: it has no runs to compare. Run the sub-command learn first")
    rates = list(dict.fromkeys(rate for row in rows for rate in row["by_rate"]))
    body = [
        [
            row["change"],
            str(row["seeds"]),
            *(f"{row['by_rate'][rate]:.4f}" if rate in row["by_rate"] else "" for rate in rates),
            f"{row['behind_defaults']:+.4f}" if row["change"] != UNCHANGED else "",
        ]
        for row in rows
    ]
    heading = ["change", "seeds", *(f"rate {rate}" for rate in rates), "best minus best of defaults"]
    text = f"Made by `{COMMAND}`. Mean final held-out loss, nats per token:\n\n{table(heading, body)}\n"
    if options.markdown:
        write(options.markdown, {SECTION: text})
    else:
        print(text, file=sys.stderr)
    return {"rows": rows, "missing": [trial.name for trial in missing]}


def main(arguments: Sequence[str]) -> int:
    """Run the command line. Return the exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Train with one Shampoo option changed at a time.")
    commands = parser.add_subparsers(required=True, metavar="learn|table")
    for name, function in (("learn", learn), ("table", tabulate)):
        verb = commands.add_parser(name)
        verb.set_defaults(run=function)
        verb.add_argument("--workdir", type=Path, default=Path("runs/defaults"), metavar="DIR", help="%(default)s")
        verb.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0])
        verb.add_argument("--rates", type=lambda text: [float(x) for x in text.split(",")], default=[6e-3, 1.2e-2])
        verb.add_argument(
            "--changes",
            type=lambda text: text.split(";"),
            default=list(CHANGES),
            metavar="NAME;NAME",
            help=f"default: all of {'; '.join(CHANGES)}",
        )
    commands.choices["table"].add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    return command.report(lambda: options.run(options))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
