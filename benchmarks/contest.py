"""Compare variants of a config, each at its best learning rate: a grid of rates and seeds on the real trainer.

    python -m shampax.benchmarks.contest --config=shampax/configs/lm.py --variants=sample,sample_adamw \\
        --learning_rates sample=3e-3,6e-3,1.2e-2 sample_adamw=1.5e-3,3e-3,6e-3

trains every variant with every learning rate and seed, one run after the other, and reports each run, the best rate of
each variant by the mean over seeds, and how soon each variant at its best comes to the held-out metric at which each
other ends. With --finalists=1 all rates are tried with the first seed, each variant's best with the others too. JSON
goes to standard output, progress and the tables to standard error. The same command goes on where it was stopped.
"""

import argparse
import dataclasses
import itertools
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ..framework.base import workdir
from ..framework.base.errors import UserError
from ..framework.base.json_files import read_object
from ..framework.checkpoint import ownership
from ..framework.config.check import load
from ..framework.reporting.runs import read_run
from . import command
from .documents import Section, table
from .grid import FINALISTS, LOSS, Metric, Outcome, Trial, best_rates, by, crossings, finalists, mean, rounds

_OF_THIS_MACHINE = ("--output", "--reuse", "--markdown")  # flags that decide nothing of the outcome


def trials(learning_rates: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> list[Trial]:
    """The whole grid, as many rates for each variant; the first seed of everything comes first."""
    rows = [dict(zip(learning_rates, rates, strict=True)) for rates in zip(*learning_rates.values(), strict=True)]
    return [Trial(variant, rate, seed) for seed in seeds for row in rows for variant, rate in row.items()]


def config_of(trial: Trial, file: str, settings: Sequence[str]) -> ConfigDict:
    """The trial's config: a variant of a config file with `settings` ("key=value"), rate and seed.

    Raises:
      UserError: there is no such file, variant or key.
    """
    return load(f"{file}:{trial.variant}", [*settings, *trial.settings])


def read_outcome(trial: Trial, path: pathlib.Path) -> Outcome | None:
    """Read a workdir; None where no run has ended."""
    result = read_object(path / workdir.RESULT)
    return None if result is None else Outcome(trial, read_run(path), result)


def analyse(outcomes: Sequence[Outcome], metric: Metric = LOSS, shown: Sequence[str] = ()) -> dict[str, Any]:
    """Everything the grid tells, as JSON: `runs`, `rates` (means over seeds), `best` and `crossings`.

    `shown` are held-out metrics to be given besides.
    """
    best, names = best_rates(outcomes, metric), [metric.name, *shown]
    cells = by(outcomes, lambda outcome: (outcome.trial.variant, outcome.trial.learning_rate))
    at_best = {variant: cells[variant, rate] for variant, rate in best.items()}
    return {
        "runs": [
            {
                **dataclasses.asdict(outcome.trial),
                **{name: Metric(name).of(outcome.result) if outcome.complete else None for name in names},
                "steps": outcome.result["steps"],
                "seconds": outcome.result["seconds"],
                "stopped": outcome.result["stopped"],
            }
            for outcome in outcomes
        ],
        "rates": [
            {
                "variant": variant,
                "learning_rate": rate,
                "seeds": len(runs),
                "mean": mean(runs, metric) if all(run.complete for run in runs) else None,
                "best": best[variant] == rate,
            }
            for (variant, rate), runs in cells.items()
        ],
        "metric": dataclasses.asdict(metric),
        "shown": list(shown),
        "best": best,
        "crossings": [
            entry
            for challenger, baseline in itertools.permutations(best, 2)
            for entry in crossings(at_best[challenger], at_best[baseline], metric)
        ],
    }


def markdown(analysis: dict[str, Any], command: str) -> str:
    """The analysis as Markdown tables, with the command that makes them."""
    names = [analysis["metric"]["name"], *analysis["shown"]]
    titles = [f"held-out {name.replace('_', ' ')}" for name in names]
    runs = [
        [
            run["variant"],
            f"{run['learning_rate']:g}",
            str(run["seed"]),
            *(_decimals(run[name]) for name in names),
            f"{run['steps']:,}",
            f"{run['seconds']:,.0f}",
            run["stopped"] or "complete",
        ]
        for run in analysis["runs"]
    ]
    rates = [
        [
            rate["variant"],
            f"{rate['learning_rate']:g}",
            str(rate["seeds"]),
            "incomplete" if rate["mean"] is None else _decimals(rate["mean"]),
            "best" if rate["best"] else "",
        ]
        for rate in analysis["rates"]
    ]
    reached = [
        [
            entry["variant"],
            f"{entry['reaches']}'s {entry['target']:.4f}",
            str(entry["seed"]),
            *(
                ["not reached", "", "", "", ""]
                if entry["steps"] is None
                else [
                    f"{entry['steps']:,.0f}",
                    f"{entry['fraction_of_steps']:.1%}",
                    f"{entry['evaluated_at']:,}",
                    f"{entry['seconds']:,.0f}",
                    f"{entry['fraction_of_seconds']:.1%}",
                ]
            ),
        ]
        for entry in analysis["crossings"]
    ]
    parts = [
        f"Made by `{command}`.",
        f"Mean {titles[0]} at the end, over seeds:",
        table(["variant", "learning rate", "seeds", titles[0], ""], rates),
        *(f"The best rate of {variant} stands at the edge of the grid." for variant in _at_edge(analysis)),
        f"At its best rate, when each variant comes to the mean {titles[0]} at which the other ends (interpolated "
        "between evaluations; shares are of the other's whole run):",
        table(
            ["variant", "comes to", "seed", "steps", "share", "first evaluation there", "seconds", "share"],
            reached,
        ),
        "Every run:",
        table(
            [
                "variant",
                "learning rate",
                "seed",
                *titles,
                "steps",
                "seconds",
                "state",
            ],
            runs,
        ),
    ]
    return "\n\n".join(parts) + "\n"


def train(trial: Trial, path: pathlib.Path, config: str, settings: Sequence[str]) -> None:
    """Make one run in a process of its own, its output beside the workdir.

    Raises:
      UserError: it left no result.
    """
    log = path.with_name(f"{path.name}.log")
    command = [
        sys.executable,
        "-m",
        "shampax.launch.train",
        f"--config={config}:{trial.variant}",
        f"--workdir={path}",
        *(f"--config.{setting}" for setting in (*settings, *trial.settings)),
    ]
    with log.open("a") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        finally:
            # Interrupted: the trainer saves and ends before we do, or it would train on unseen.
            if process.poll() is None:
                process.terminate()
                process.wait()
    if read_object(path / workdir.RESULT) is None:
        lines = log.read_text().splitlines() or ["nothing"]
        raise UserError(f"{trial.name} ended with exit code {code} and no result; it said: {lines[-1]} (all: {log})")


def run_grid(grid: Sequence[Trial], options: argparse.Namespace) -> list[Outcome]:
    """Make the runs that are not complete yet; returns all.

    Raises:
      UserError: a config cannot be made, a workdir belongs to another config, or a run left no result.
    """
    folders = [folder for folder in (options.output, options.reuse) if folder]
    # What can be refused is refused before hours of training.
    for trial in grid:
        config = config_of(trial, options.config, options.set)
        for folder in folders:
            ownership.refuse_foreign(folder / trial.name, config)
    options.output.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    durations: list[float] = []
    for number, trial in enumerate(grid, start=1):
        path, place = options.output / trial.name, f"[{number}/{len(grid)}] {trial.name}"
        config = config_of(trial, options.config, options.set)
        complete = [folder / trial.name for folder in folders if ownership.finished(folder / trial.name, config)]
        if not complete:
            left = np.mean(durations or [np.nan]) * (len(grid) - number + 1) / 60
            _say(f"{place}: training{f', about {left:.0f} minutes left' if durations else ''}")
            start = time.monotonic()
            train(trial, path, options.config, options.set)
            durations.append(time.monotonic() - start)
        outcome = read_outcome(trial, complete[0] if complete else path)
        assert outcome is not None, "complete runs and trained ones have a result"
        result = outcome.result
        _say(
            f"{place}: held-out loss {_decimals(result['heldout_loss'])} after {result['steps']} steps, "
            f"{result['seconds']:.0f} s ({result['stopped'] or 'complete'})"
        )
        outcomes.append(outcome)
    return outcomes


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    kept = [argument for argument in arguments if not argument.startswith(_OF_THIS_MACHINE)]
    line = f"python -m shampax.benchmarks.contest {shlex.join(kept)}"
    section = Section(f"contest {options.section or pathlib.Path(options.config).stem}")

    def run() -> dict[str, Any]:
        rates = _rates(options.variants, options.learning_rates)
        metric = Metric(options.metric, options.higher)
        if options.markdown:
            # Before hours of training, not after.
            section.replace(_document(options.markdown, section), "")
        first, later = rounds(options.seeds, options.finalists)
        outcomes = run_grid(trials(rates, first), options)
        if later:
            outcomes += run_grid(trials(finalists(outcomes, metric, options.finalists), later), options)
        analysis = analyse(outcomes, metric, options.show)
        text = markdown(analysis, line)
        if options.markdown:
            options.markdown.parent.mkdir(parents=True, exist_ok=True)
            options.markdown.write_text(section.replace(_document(options.markdown, section), text))
        _say(text)
        return analysis

    return command.report(run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m shampax.benchmarks.contest",
        description="A grid of learning rates and seeds for several config variants, and who learns fastest.",
        allow_abbrev=False,
    )

    def several(of: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [of(part) for part in text.split(",")]

    parser.add_argument("--config", default="shampax/configs/lm.py", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--variants", type=several(str), default=["sample", "sample_adamw"], metavar="NAME,NAME")
    parser.add_argument(
        "--learning_rates",
        nargs="+",
        required=True,
        metavar="[VARIANT=]RATE,RATE",
        help="of all variants, or as many for each one",
    )
    parser.add_argument("--metric", default="loss", metavar="NAME", help="held-out metric that decides")
    parser.add_argument("--higher", action="store_true", help="more of the metric is better")
    parser.add_argument("--show", type=several(str), default=[], metavar="NAME,NAME", help="other held-out metrics")
    parser.add_argument("--seeds", type=several(int), default=[0, 1, 2], metavar="SEED,SEED")
    parser.add_argument("--finalists", type=int, default=0, metavar="N", help=FINALISTS)
    parser.add_argument("--output", type=pathlib.Path, default="runs/grid", metavar="DIR", help="of the workdirs")
    parser.add_argument("--reuse", type=pathlib.Path, metavar="DIR", help="take finished workdirs from here, too")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="config values for all runs",
    )
    parser.add_argument(
        "--markdown",
        type=pathlib.Path,
        metavar="FILE",
        help="write the tables between <!-- contest NAME begin --> and its end in it",
    )
    parser.add_argument("--section", metavar="NAME", help="of the file; default: the config file's name")
    return parser


def _rates(variants: Sequence[str], given: Sequence[str]) -> dict[str, list[float]]:
    """Learning rates of each variant.

    Raises:
      UserError: they are no numbers, of other variants, or more for one than for another.
    """
    rates: dict[str, list[float]] = {}
    for text in given:
        variant, equals, numbers = text.rpartition("=")
        try:
            values = [float(number) for number in numbers.split(",")]
        except ValueError:
            raise UserError(f"--learning_rates {text!r}: give numbers with commas between them") from None
        for name in [variant] if equals else variants:
            rates[name] = values
    counts = {name: len(values) for name, values in rates.items()}
    if set(rates) != set(variants) or len(set(counts.values())) != 1:
        raise UserError(f"--learning_rates gives {counts}; give as many to each of {', '.join(variants)}")
    return {variant: rates[variant] for variant in variants}


def _document(path: pathlib.Path, section: Section) -> str:
    return path.read_text() if path.exists() else f"# Results\n\n{section.begin}\n{section.end}\n"


def _at_edge(analysis: dict[str, Any]) -> list[str]:
    edges = {}
    for variant, rates in by(analysis["rates"], lambda rate: rate["variant"]).items():
        tried = [rate["learning_rate"] for rate in rates]
        edges[variant] = len(tried) > 1 and analysis["best"][variant] in (min(tried), max(tried))
    return [variant for variant, edge in edges.items() if edge]


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
