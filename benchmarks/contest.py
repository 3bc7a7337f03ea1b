"""Compare variants of a config, each at its best learning rate, by training a grid of rates and seeds.

    python -m shampax.benchmarks.contest --config=shampax/configs/lm.py --variants=sample,sample_adamw \\
        --learning_rates sample=3e-3,6e-3,1.2e-2 sample_adamw=1.5e-3,3e-3,6e-3

The trainer runs once for every variant, learning rate and seed, one run after the other. The report has every run, the
best rate of each variant by its mean over seeds, and the step at which each variant at its best rate reaches the final
held-out metric of every other. With --finalists=1, all rates are trained with the first seed, and only the best rate of
each variant with the other seeds. JSON goes to standard output; progress and tables go to standard error. Rerun the
same command to resume.
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

_PATHS = ("--output", "--markdown")  # flags that do not change the outcome


def trials(learning_rates: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> list[Trial]:
    """Return the whole grid, ordered by seed. Every variant must have the same number of rates."""
    rows = [dict(zip(learning_rates, rates, strict=True)) for rates in zip(*learning_rates.values(), strict=True)]
    return [Trial(variant, rate, seed) for seed in seeds for row in rows for variant, rate in row.items()]


def config_of(trial: Trial, file: str, settings: Sequence[str]) -> ConfigDict:
    """Load the variant of a config file with `settings` ("key=value") and the trial's rate and seed.

    Raises:
      UserError: the file, variant or key does not exist.
    """
    return load(f"{file}:{trial.variant}", [*settings, *trial.settings])


def read_outcome(trial: Trial, path: pathlib.Path) -> Outcome | None:
    """Read a workdir. Return None if it has no result."""
    result = read_object(path / workdir.RESULT)
    return None if result is None else Outcome(trial, read_run(path), result)


def analyse(outcomes: Sequence[Outcome], metric: Metric = LOSS, shown: Sequence[str] = ()) -> dict[str, Any]:
    """Return the analysis as JSON: `runs`, `rates` (means over seeds), `best` and `crossings`.

    `shown` lists further held-out metrics to report.
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
    """Format the analysis as Markdown tables, with the command that makes them."""
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
        f"Mean final {titles[0]} over seeds:",
        table(["variant", "learning rate", "seeds", titles[0], ""], rates),
        *(f"The best rate of {variant} is at the edge of the grid." for variant in _at_edge(analysis)),
        f"Step at which each variant, at its best rate, reaches the other's mean final {titles[0]} (interpolated "
        "between evaluations; shares are of the other's whole run):",
        table(
            ["variant", "reaches", "seed", "steps", "share", "first evaluation there", "seconds", "share"],
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
    """Train in a separate process. Its output goes to a log beside the workdir.

    Raises:
      UserError: the process ended without a result.
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
            # After an interrupt, wait until the trainer has saved: it must not outlive this process.
            if process.poll() is None:
                process.terminate()
                process.wait()
    if read_object(path / workdir.RESULT) is None:
        lines = log.read_text().splitlines() or ["(empty)"]
        raise UserError(f"{trial.name} exited with code {code} without a result. Last line of {log}: {lines[-1]}")


def run_grid(grid: Sequence[Trial], options: argparse.Namespace) -> list[Outcome]:
    """Train the runs that are not complete yet. Return the outcomes of all.

    Raises:
      UserError: a config is invalid, a workdir belongs to another config, or a run ended without a result.
    """
    # Check every trial before hours of training.
    for trial in grid:
        ownership.finished(options.output / trial.name, config_of(trial, options.config, options.set))
    options.output.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    durations: list[float] = []
    for number, trial in enumerate(grid, start=1):
        path, place = options.output / trial.name, f"[{number}/{len(grid)}] {trial.name}"
        if not ownership.finished(path, config_of(trial, options.config, options.set)):
            left = np.mean(durations or [np.nan]) * (len(grid) - number + 1) / 60
            _say(f"{place}: training{f', about {left:.0f} minutes left' if durations else ''}")
            start = time.monotonic()
            train(trial, path, options.config, options.set)
            durations.append(time.monotonic() - start)
        outcome = read_outcome(trial, path)
        assert outcome is not None, "train() raises if there is no result"
        result = outcome.result
        _say(
            f"{place}: held-out loss {_decimals(result['heldout_loss'])} after {result['steps']} steps, "
            f"{result['seconds']:.0f} s ({result['stopped'] or 'complete'})"
        )
        outcomes.append(outcome)
    return outcomes


def main(arguments: Sequence[str]) -> int:
    """Run the command line. Return the exit code."""
    options = _parser().parse_args(arguments)
    kept = [argument for argument in arguments if not argument.startswith(_PATHS)]
    line = f"python -m shampax.benchmarks.contest {shlex.join(kept)}"
    section = Section(f"contest {options.section or pathlib.Path(options.config).stem}")

    def run() -> dict[str, Any]:
        rates = _rates(options.variants, options.learning_rates)
        metric = Metric(options.metric, options.higher)
        if options.markdown:
            # Fail before hours of training, not after.
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
        description="Train several config variants on a grid of learning rates and seeds, and compare them.",
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
        help="rates of all variants or of one; every variant needs the same number",
    )
    parser.add_argument("--metric", default="loss", metavar="NAME", help="held-out metric to compare by")
    parser.add_argument("--higher", action="store_true", help="higher values of the metric are better")
    parser.add_argument("--show", type=several(str), default=[], metavar="NAME,NAME", help="further metrics to report")
    parser.add_argument("--seeds", type=several(int), default=[0, 1, 2], metavar="SEED,SEED")
    parser.add_argument("--finalists", type=int, default=0, metavar="N", help=FINALISTS)
    parser.add_argument("--output", type=pathlib.Path, default="runs/grid", metavar="DIR", help="folder for workdirs")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="config values of all runs",
    )
    parser.add_argument(
        "--markdown",
        type=pathlib.Path,
        metavar="FILE",
        help="write the tables between the lines <!-- contest NAME begin --> and <!-- contest NAME end -->",
    )
    parser.add_argument("--section", metavar="NAME", help="NAME in these lines; default: the config file's name")
    return parser


def _rates(variants: Sequence[str], given: Sequence[str]) -> dict[str, list[float]]:
    """Parse the learning rates of each variant.

    Raises:
      UserError: a rate is not a number, or variants have unequal numbers of rates.
    """
    rates: dict[str, list[float]] = {}
    for text in given:
        variant, equals, numbers = text.rpartition("=")
        try:
            values = [float(number) for number in numbers.split(",")]
        except ValueError:
            raise UserError(f"--learning_rates={text}: rates must be numbers separated by commas") from None
        for name in [variant] if equals else variants:
            rates[name] = values
    counts = {name: len(values) for name, values in rates.items()}
    if set(rates) != set(variants) or len(set(counts.values())) != 1:
        raise UserError(
            f"--learning_rates: give the same number of rates to each of {', '.join(variants)}, not {counts}"
        )
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
