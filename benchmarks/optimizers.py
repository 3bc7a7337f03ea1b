"""Compare AdamW, Muon, Google's Shampoo and our Shampoo, SOAP and KL-Shampoo on one model and grid, on one device.

    make install EXTRA=benchmarks
    python -m shampax.benchmarks.optimizers learn
    python -m shampax.benchmarks.optimizers time
    python -m shampax.benchmarks.optimizers cost
    python -m shampax.benchmarks.optimizers table --markdown=docs/results.md

learn trains the sample of configs/lm.py with every optimizer, learning rate and seed. Each run is a file in the
workdir; rerun the same command to resume. With --finalists=1, all learning rates are trained with the first seed, and
only each optimizer's best rate with the other seeds; pass the same flag to table. time measures train steps of this
model, with the optimizers in turns. cost measures only the optimizers' updates, for a Transformer of 25 M parameters.
table reports all three. JSON goes to standard output; time and cost also store it in the workdir. Progress goes to
standard error.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ..framework.base import paths, workdir
from ..framework.base.errors import UserError
from ..framework.base.json_files import read_object
from ..framework.config.check import load
from ..framework.reporting.runs import Axis
from ..models.lm import LMTask
from ..optimizers import ShampooOptions
from . import command, documents, figure, learning, standings, timing
from .contestants import RATES, TITLES, GoogleOptions, google_package
from .grid import FINALISTS, LOSS, Trial, finalists, rounds

COMMAND = "python -m shampax.benchmarks.optimizers"
RUNS, TIMES, COSTS = "learn", "time.json", "cost-{}.json"


def learn(options: argparse.Namespace) -> dict[str, Any]:
    """Train the runs that are missing in the workdir. Return a summary of all runs."""
    first, later = rounds(options.seeds, options.finalists)
    grid = trials(_rates(options), first)
    if "google" in options.optimizers:
        google_package()  # fail before hours of training the other optimizers
    workload = _workload(options)
    programs: dict[str, learning.Program] = {}

    def run(trial: Trial) -> dict[str, Any]:
        if trial.variant not in programs:
            programs[trial.variant] = workload.program(workload.options[trial.variant])
        return learning.train(workload, programs[trial.variant], trial)

    def make(grid: Sequence[Trial]) -> list[dict[str, Any]]:
        return learning.run_grid(grid, options.workdir / RUNS, lambda trial: learning.settings_of(workload, trial), run)

    results = make(grid)
    if later:
        outcomes, _ = learning.read_grid(grid, options.workdir / RUNS, {})
        results += make(trials(finalists(outcomes, LOSS, options.finalists), later))
    return {
        "runs": [
            {name: result[name] for name in ("variant", "learning_rate", "seed", "steps", "stopped", "fingerprint")}
            | {"heldout_loss": result["heldout"][-1]["loss"]}
            for result in results
        ]
    }


def time_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Measure train steps of all optimizers, in turns of one refresh interval of our Shampoo."""
    workload = _workload(options)
    interval = workload.options["ours"].interval
    early = -(-timing.early_steps(workload.options["ours"]) // interval)
    rates = {name: rates[len(rates) // 2] for name, rates in _rates(options).items()}
    measured = timing.time_steps(workload, rates, interval=interval, turns=-(-options.steps // interval) + early)
    result = {"device": _device(), "interval": interval, "workload": workload.settings, "optimizers": measured}
    _store(options.workdir / TIMES, result)
    return result


def cost(options: argparse.Namespace) -> dict[str, Any]:
    """Measure updates of our Shampoo and Google's in turns, then our two solvers in turns in a separate process."""
    size = options.embed_dim
    task = LMTask(
        vocab_size=8_192,
        layers=options.layers,
        embed_dim=size,
        heads=size // 64,
        kv_heads=size // 64,
        head_dim=64,
        mlp_dim=3 * size,
    )
    ours = ShampooOptions(
        block_size=options.block_size, interval=options.interval, early_intervals=(), exponent=0.5, ridge=1e-4
    )
    same: dict[str, Any] = {"p": 2, "ridge": 1e-4, "largest_side": task.vocab_size - 1}
    sides = {
        "google": GoogleOptions(options.block_size, options.interval, **same),
        "ours": ours,
        "ours_eigh": dataclasses.replace(ours, solver="eigh"),
    }
    chosen = ("ours", "ours_eigh") if options.eigh_only else ("google", "ours")
    shared = {"block_size": options.block_size, "interval": options.interval, "intervals": options.intervals}
    measured = timing.time_updates(
        task,
        {name: sides[name] for name in chosen},
        interval=options.interval,
        intervals=options.intervals,
        repetitions=options.repetitions,
    )
    result = {"device": _device(), **shared, "repetitions": options.repetitions, **measured, "eigh": None}
    if not options.eigh_only:
        if options.eigh_timeout:
            result["eigh"] = _eigh(options)
        _store(options.workdir / COSTS.format(options.block_size), result)
    return result


def table(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the measurements in the workdir. Write tables into --markdown or to standard error, and draw --figure."""
    times = read_object(options.workdir / TIMES)
    costs = [read_object(path) for path in options.workdir.glob(COSTS.format("*"))]
    costs = sorted((cost for cost in costs if cost), key=lambda cost: cost["block_size"])
    timed = times["optimizers"] if times else {}
    first, later = rounds(options.seeds, options.finalists)
    folder, seconds = options.workdir / RUNS, standings.seconds_per_step(timed)
    outcomes, missing = learning.read_grid(trials(_rates(options), first), folder, seconds)
    if later:
        chosen = trials(finalists(outcomes, LOSS, options.finalists), later)
        further, missing_later = learning.read_grid(chosen, folder, seconds)
        outcomes, missing = outcomes + further, missing + missing_later
    comparison = standings.compare(outcomes, missing, timed)
    flag = f" --finalists={options.finalists}" if later else ""
    contents = {standings.SECTION: standings.markdown(comparison, times, f"{COMMAND} table{flag}")}
    if costs:  # without measurements, keep the document's section
        contents[standings.COSTS] = standings.costs_markdown(costs)
    if options.markdown:
        documents.write(options.markdown, contents)
    else:
        print(*contents.values(), sep="\n", file=sys.stderr)
    if options.figure:
        groups = standings.at_their_best(outcomes, comparison)
        axes: list[Axis] = ["step", "seconds"] if set(comparison["best"]) <= set(timed) else ["step"]
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        figure.loss_figure(groups, axes).savefig(options.figure)
    return comparison


def trials(rates: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> list[Trial]:
    """Return the grid, ordered by seed, so that an interrupted grid has about as many runs of each optimizer."""
    return [Trial(name, rate, seed) for seed in seeds for name in rates for rate in rates[name]]


def main(arguments: Sequence[str]) -> int:
    """Run the command line. Return the exit code."""
    options = _parser().parse_args(arguments)
    return command.report(lambda: options.run(options))


def _rates(options: argparse.Namespace) -> dict[str, tuple[float, ...]]:
    """Return the learning rates of each optimizer.

    Raises:
      UserError: optimizers have unequal numbers of rates.
    """
    given = RATES | dict(options.rates)
    rates = {name: given[name] for name in options.optimizers}
    counts = {name: len(of_name) for name, of_name in rates.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"--rates: give the same number of learning rates to each optimizer, not {shown}")
    return rates


def _workload(options: argparse.Namespace) -> learning.Workload:
    return learning.Workload(load(options.config, options.set), options.workdir / workdir.CACHE)


def _eigh(options: argparse.Namespace) -> dict[str, Any]:
    """Measure our two solvers in a process with a time limit: on CPU, two concurrent LAPACK calls can deadlock."""
    numbers = ("block_size", "interval", "intervals", "repetitions", "layers", "embed_dim")
    flags = [f"--{name}={getattr(options, name)}" for name in numbers]
    command = [sys.executable, "-m", "shampax.benchmarks.optimizers", "cost", "--eigh_only", *flags]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=options.eigh_timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"stopped": f"did not finish within {options.eigh_timeout:g} s"}
    if done.returncode:
        return {"stopped": f"exited with code {done.returncode}"}
    return json.loads(done.stdout) | {"stopped": None}


def _device() -> str:
    device = jax.devices()[0]
    cores = f" on {os.cpu_count()} cores" if device.platform == "cpu" else ""
    return f"one {device.device_kind} device{cores}"


def _store(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    paths.write_text(paths.of(path), json.dumps(result, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Compare optimizers.")
    commands = parser.add_subparsers(required=True, metavar="learn|time|cost|table")
    workdirs = argparse.ArgumentParser(add_help=False)
    workdirs.add_argument("--workdir", type=Path, default=Path("runs/optimizers"), metavar="DIR", help="%(default)s")
    grid = argparse.ArgumentParser(add_help=False)
    grid.add_argument("--optimizers", type=_names, default=list(TITLES), metavar="NAME,NAME", help=", ".join(TITLES))
    grid.add_argument(
        "--rates",
        type=_named_rates,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=RATE,RATE",
        help="peak learning rates instead of the defaults; every optimizer needs the same number",
    )
    grid.add_argument(
        "--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2], metavar="SEED,SEED"
    )
    grid.add_argument("--finalists", type=int, default=0, metavar="N", help=FINALISTS)
    sample = argparse.ArgumentParser(add_help=False)
    sample.add_argument("--config", default="shampax/configs/lm.py:sample", metavar="FILE:VARIANT", help="%(default)s")
    sample.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="config values")

    verb = commands.add_parser("learn", parents=[workdirs, grid, sample], help="train the whole grid")
    verb.set_defaults(run=learn)
    verb = commands.add_parser("time", parents=[workdirs, grid, sample], help="measure train steps")
    verb.add_argument("--steps", type=int, default=200, metavar="N", help="minimum per optimizer; default: %(default)s")
    verb.set_defaults(run=time_steps)
    verb = commands.add_parser("cost", parents=[workdirs], help="measure only the optimizers' updates")
    for name, default, text in (
        ("block_size", 128, "largest side of a block"),
        ("interval", 20, "steps from one refresh to the next"),
        ("intervals", 2, "intervals per repetition"),
        ("repetitions", 3, "repetitions of the measurement"),
        ("layers", 6, "layers of the Transformer"),
        ("embed_dim", 512, "width of the Transformer"),
    ):
        verb.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text}; default: {default}")
    verb.add_argument("--eigh_timeout", type=float, default=900, metavar="S", help="limit for eigh in s; 0: skip eigh")
    verb.add_argument("--eigh_only", action="store_true", help="measure our two solvers, not Google's Shampoo")
    verb.set_defaults(run=cost)
    verb = commands.add_parser("table", parents=[workdirs, grid], help="report all measurements")
    verb.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help=f"write tables after the line {standings.SECTION.begin} and costs after the line {standings.COSTS.begin}",
    )
    verb.add_argument("--figure", type=Path, metavar="PNG", help="draw the losses of each optimizer at its best rate")
    verb.set_defaults(run=table)
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in TITLES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown. Choose from: {', '.join(TITLES)}")
    return names


def _named_rates(text: str) -> tuple[str, tuple[float, ...]]:
    name, _, rates = text.partition("=")
    (name,) = _names(name)
    return name, tuple(float(rate) for rate in rates.split(","))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
