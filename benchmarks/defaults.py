"""Where our defaults come from: the sample of configs/lm.py with one option of ours changed at a time.

    python -m shampax.benchmarks.defaults learn
    python -m shampax.benchmarks.defaults table --markdown=docs/results.md

Every change is trained with the same learning rates and seeds as no change. Each run is a file in the workdir, and the
same command goes on where it was stopped. JSON goes to standard output, progress to standard error.
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
    "graft sign": {"graft": "sign"},
    "graft norm of the block": {"graft_norm": "block"},
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
    """The grid, the first seed of everything first.

    Raises:
      UserError: a change that there is not.
    """
    unknown = [name for name in options.changes if name not in CHANGES]
    if unknown:
        raise UserError(f"there is no change {unknown[0]!r}; there is {', '.join(CHANGES)}")
    return [Trial(name, rate, seed) for seed in options.seeds for name in options.changes for rate in options.rates]


def variants(ours: ShampooOptions) -> dict[str, ShampooOptions]:
    """Our options for the sample, but for the momentum, which has its default again, under every change."""
    unchanged = dataclasses.replace(ours, beta1=ShampooOptions.beta1)
    return {name: dataclasses.replace(unchanged, **change) for name, change in CHANGES.items()}


def learn(options: argparse.Namespace) -> dict[str, Any]:
    """Make the runs that the workdir does not hold; returns how each ended."""
    workload = learning.Workload(load("shampax/configs/lm.py:sample"), options.workdir / workdir.CACHE)
    workload.options = variants(workload.options["ours"])
    programs: dict[str, learning.Program] = {}

    def run(trial: Trial) -> dict[str, Any]:
        if trial.variant not in programs:
            programs.clear()  # the others' programs are done with
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
    """For each change, best first: the mean loss of each rate over its seeds, the least of them, and what it gains.

    Means are of the seeds that the change and no change have both been trained with.
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
    """The comparison of what the workdir holds; written into the --markdown file or to standard error."""
    outcomes, missing = learning.read_grid(trials(options), options.workdir / "learn", {})
    rows = compare(outcomes)
    if not rows:
        raise UserError("there is no run in the workdir; make some with the sub-command learn")
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
    heading = ["change", "seeds", *(f"rate {rate}" for rate in rates), "best, less that of no change"]
    text = f"Made by `{COMMAND}`. Mean held-out loss at the end, nats per token:\n\n{table(heading, body)}\n"
    if options.markdown:
        write(options.markdown, {SECTION: text})
    else:
        print(text, file=sys.stderr)
    return {"rows": rows, "missing": [trial.name for trial in missing]}


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Our options, one changed at a time.")
    commands = parser.add_subparsers(required=True, metavar="learn|table")
    for name, function in (("learn", learn), ("table", tabulate)):
        verb = commands.add_parser(name)
        verb.set_defaults(run=function)
        verb.add_argument("--workdir", type=Path, default=Path("runs/defaults"), metavar="DIR", help="%(default)s")
        verb.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0])
        verb.add_argument("--rates", type=lambda text: [float(x) for x in text.split(",")], default=[6e-3, 1.2e-2])
        verb.add_argument(
            "--changes", type=lambda text: text.split(";"), default=list(CHANGES), metavar="NAME;NAME", help="which"
        )
    commands.choices["table"].add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    return command.report(lambda: options.run(options))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
