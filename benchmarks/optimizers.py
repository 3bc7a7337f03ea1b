"""Compare AdamW, Muon, Google's Shampoo and our Shampoo and its siblings on one or more tasks, on one device.

    make install EXTRA=benchmarks
    python -m shampax.benchmarks.optimizers learn --config=shampax/configs/lm.py:bytes
    python -m shampax.benchmarks.optimizers time --config=shampax/configs/lm.py:bytes
    python -m shampax.benchmarks.optimizers equal --config=shampax/configs/lm.py:bytes
    python -m shampax.benchmarks.optimizers cost
    python -m shampax.benchmarks.optimizers table --markdown=docs/results/optimizers.md

learn trains a config's model with every optimizer. All are tuned alike, by `trials.search`: a ladder of learning rates,
then the other changes under the first seed, then the other seeds at the best settings. Each run is a file in the
workdir; rerun the same command to resume. time measures train steps of this model, with the optimizers in turns. equal
then trains each optimizer for as many steps as fit into the time of the fastest one's run. cost measures only the
optimizers' updates, for a Transformer of 25 M parameters. table reports all measurements in the workdir. JSON goes to
standard output; time and cost also store it in the workdir. Progress goes to standard error.
"""

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ..framework.base import paths, workdir
from ..framework.base.errors import UserError
from ..framework.base.json_files import read_object
from ..framework.config import components
from ..framework.config.check import load
from ..models.lm import LMTask
from ..optimizers import ShampooOptions
from . import command, documents, figure, learning, standings, timing
from .contestants import CONTESTANTS, FIRST, GoogleOptions, google_package
from .outcomes import Metric
from .trials import CHANGES, Trial, search

COMMAND = "python -m shampax.benchmarks.optimizers"
SHAMPOO = f"{ShampooOptions.__module__}:{ShampooOptions.__qualname__}"
RUNS, EQUAL, TIMES, COSTS = "learn", "equal", "time.json", "cost-{}.json"


def learn(options: argparse.Namespace) -> dict[str, Any]:
    """Train the runs of the search that are missing in the workdir. Return the best settings of each optimizer."""
    if "google" in options.optimizers:
        google_package()  # fail before hours of training the other optimizers
    workload, folder, centres = _workload(options)
    metric, best = Metric(options.metric, options.higher), {}
    for name in options.optimizers:
        programs: dict[Any, learning.Program] = {}

        def loss_of(trial: Trial, programs: dict[Any, learning.Program] = programs) -> float:
            made = learning.run(workload, trial, folder / RUNS, programs)
            return math.inf if made["stopped"] else metric.falling(made["heldout"][-1][metric.name])

        first = FIRST | options.fixed
        start = workload.chosen(Trial.of(name, **first))
        changes = [change for change in CHANGES if workload.chosen(Trial.of(name, **first | change)) != start]
        centre = options.rate_factor * centres[name]
        found = search(name, centre, loss_of, options.seeds, [] if options.fixed else changes, first)
        best[name] = dict(found.settings)
    return {"best": best}


def time_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Measure train steps of all optimizers, in turns of one refresh interval of our Shampoo."""
    workload, folder, _ = _workload(options)
    chosen = {name: workload.options(Trial.of(name, **FIRST)) for name in options.optimizers}
    interval = workload.options(Trial.of("ours", **FIRST)).interval
    early = -(-max(timing.early_steps(each) for each in chosen.values()) // interval)
    turns, clock = -(-options.steps // interval) + early, _clock(options)
    measured = timing.time_steps(workload, chosen, interval=interval, turns=turns, clock=clock)
    result = {"device": _device(options), "interval": interval, "workload": workload.settings, "optimizers": measured}
    _store(folder / TIMES, result)
    return result


def equal_seconds(options: argparse.Namespace) -> dict[str, Any]:
    """Train each optimizer at its best settings for as long as the fastest one's whole run takes.

    Return the number of steps of each. The learning rate decays over these steps. Runs that are as long as those of
    `learn` are not repeated.

    Raises:
      UserError: the workdir lacks step times.
    """
    workload, folder, _ = _workload(options)
    best = standings.at_their_best(learning.read(folder / RUNS), Metric(options.metric, options.higher))
    timed = read_object(folder / TIMES)
    if timed is None:
        raise UserError(f"{folder / TIMES}: it does not exist. Run the sub-command time first")
    means = {name: timed["optimizers"][name]["mean_ms"] for name in options.optimizers if name in best}
    steps = {name: round(workload.total_steps * min(means.values()) / mean) for name, mean in means.items()}
    for name, count in steps.items():
        shorter, _, _ = _workload(options, f"duration={count} steps")
        programs: dict[Any, learning.Program] = {}
        for outcome in best[name]:
            learning.run(shorter, outcome.trial, folder / EQUAL, programs)
    return {"steps": steps}


def cost(options: argparse.Namespace) -> dict[str, Any]:
    """Measure updates of our Shampoo, Muon and Google's Shampoo in turns."""
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
    shampoo = ShampooOptions(block_size=options.block_size)
    ours = CONTESTANTS["ours"].options(shampoo)
    chosen = {
        "google": GoogleOptions(options.block_size, options.interval),
        "muon": CONTESTANTS["muon"].options(shampoo),
        "ours": dataclasses.replace(ours, interval=options.interval, early_intervals=()),
    }
    shared = {"block_size": options.block_size, "interval": options.interval, "intervals": options.intervals}
    measured = timing.time_updates(
        task,
        {name: chosen[name] for name in options.optimizers},
        interval=options.interval,
        intervals=options.intervals,
        repetitions=options.repetitions,
        clock=_clock(options),
    )
    result = {"device": _device(options), **shared, "repetitions": options.repetitions, **measured}
    _store(options.workdir / COSTS.format(options.block_size), result)
    return result


def table(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the measurements in the workdir. Write tables into --markdown or to standard error, and draw --figure."""
    costs = [read_object(path) for path in options.workdir.glob(COSTS.format("*"))]
    costs = sorted((cost for cost in costs if cost), key=lambda cost: cost["block_size"])
    metric, comparisons, times, groups = Metric(options.metric, options.higher), {}, {}, {}
    for folder in sorted(path.parent for path in options.workdir.glob(f"*/{RUNS}")):
        title = folder.name
        timed = read_object(folder / TIMES)
        if timed:
            times[title] = timed
        outcomes, equal = learning.read(folder / RUNS), learning.read(folder / EQUAL)
        comparisons[title] = standings.compare(outcomes, equal, metric)
        groups[title] = standings.groups(outcomes, metric)
    comparisons = dict(sorted(comparisons.items(), key=lambda task: (task[0].partition(",")[0], task[1]["steps"])))
    if not comparisons:
        raise UserError(f"--workdir={options.workdir}: it has no runs to compare. Run the sub-command learn first")
    contents = {standings.SECTION: standings.markdown(comparisons, times, f"{COMMAND} table")}
    if costs:  # without measurements, keep the document's section
        contents[standings.COSTS] = standings.costs_markdown(costs)
    if options.markdown:
        documents.write(options.markdown, contents)
    else:
        print(*contents.values(), sep="\n", file=sys.stderr)
    if options.figure:
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        figure.loss_figure({task: groups[task] for task in comparisons}).savefig(options.figure)
    return comparisons


def main(arguments: Sequence[str]) -> int:
    """Run the command line. Return the exit code."""
    options = _parser().parse_args(arguments)
    return command.report(lambda: options.run(options))


def folder_of(parent: Path, config: str, workload: learning.Workload) -> Path:
    """Return the folder of a task's measurements, which the config and its number of steps name."""
    file, _, variant = config.partition(":")
    return parent / f"{Path(file).name}:{variant or 'sample'}, {workload.total_steps:,} steps"


def _workload(options: argparse.Namespace, *changes: str) -> tuple[learning.Workload, Path, dict[str, float]]:
    """Return the workload, the folder of its measurements, and the middle of each optimizer's ladder of rates.

    `changes` are further overrides of the config.

    Raises:
      UserError: the config's optimizer is not Shampoo, or an optimizer is neither a contestant nor a variant.
    """
    config = load(options.config, [*options.set, *changes])
    if config.optimizer.name != SHAMPOO:
        raise UserError(f"--config={options.config}: its optimizer must be Shampoo. Use a variant such as `sample`.")
    file = options.config.partition(":")[0]
    others = {
        name: load(f"{file}:{name}", [*options.set, *changes]) for name in options.optimizers if name not in CONTESTANTS
    }
    built = {name: components.build(other.optimizer) for name, other in others.items()}
    centres = {name: contestant.rate for name, contestant in CONTESTANTS.items()}
    centres |= {name: other.schedule.learning_rate for name, other in others.items()}
    workload = learning.Workload(config, options.workdir / workdir.CACHE, built)
    return workload, folder_of(options.workdir, options.config, workload), centres


def _clock(options: argparse.Namespace) -> timing.Clock:
    return time.process_time if options.cpu_time else time.perf_counter


def _device(options: argparse.Namespace) -> str:
    device = jax.devices()[0]
    cores = f" on {len(os.sched_getaffinity(0))} cores" if device.platform == "cpu" else ""
    return f"one {device.device_kind} device{cores}{', CPU time' * options.cpu_time}"


def _store(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    paths.write_text(paths.of(path), json.dumps(result, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Compare optimizers.")
    commands = parser.add_subparsers(required=True, metavar="learn|time|equal|cost|table")
    workdirs = argparse.ArgumentParser(add_help=False)
    workdirs.add_argument("--workdir", type=Path, default=Path("runs/optimizers"), metavar="DIR", help="%(default)s")
    metrics = argparse.ArgumentParser(add_help=False)
    metrics.add_argument("--metric", default="loss", metavar="NAME", help="held-out metric to compare by; %(default)s")
    metrics.add_argument("--higher", action="store_true", help="higher values of the metric are better")
    sample = argparse.ArgumentParser(add_help=False)
    sample.add_argument("--config", default="shampax/configs/lm.py:bytes", metavar="FILE:VARIANT", help="%(default)s")
    sample.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="config values")

    several = argparse.ArgumentParser(add_help=False)
    several.add_argument(
        "--optimizers",
        type=lambda text: text.split(","),
        default=list(CONTESTANTS),
        metavar="NAME,NAME",
        help=f"{', '.join(CONTESTANTS)} (the default: all), or variants of the config file for their optimizer",
    )

    clocks = argparse.ArgumentParser(add_help=False)
    clocks.add_argument(
        "--cpu_time", action="store_true", help="measure CPU time: on a busy machine, with taskset and NPROC=1"
    )
    verb = commands.add_parser(
        "learn", parents=[workdirs, metrics, sample, several], help="tune and train every optimizer"
    )
    verb.set_defaults(run=learn)
    verb.add_argument(
        "--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2], metavar="SEED,SEED"
    )
    verb.add_argument(
        "--fixed",
        type=lambda text: {
            name: json.loads(value) for name, _, value in (part.partition("=") for part in text.split(","))
        },
        default={},
        metavar="SETTING=JSON,...",
        help="settings of all runs, such as embeddings=4.0; then only learning rates are searched",
    )
    verb.add_argument("--rate_factor", type=float, default=1.0, help="factor of all learning rates; default: 1")
    verb = commands.add_parser("time", parents=[workdirs, sample, several, clocks], help="measure train steps")
    verb.set_defaults(run=time_steps)
    verb.add_argument("--steps", type=int, default=200, metavar="N", help="minimum per optimizer; default: %(default)s")
    verb = commands.add_parser(
        "equal", parents=[workdirs, metrics, sample, several], help="train as long as the fastest one's steps take"
    )
    verb.set_defaults(run=equal_seconds)
    verb = commands.add_parser("cost", parents=[workdirs, clocks], help="measure only the optimizers' updates")
    verb.set_defaults(run=cost)
    verb.add_argument(
        "--optimizers", type=lambda text: text.split(","), default=["google", "muon", "ours"], metavar="NAME,NAME"
    )
    for name, default, text in (
        ("block_size", 128, "largest side of a block"),
        ("interval", 20, "steps from one refresh to the next"),
        ("intervals", 2, "intervals per repetition"),
        ("repetitions", 3, "repetitions of the measurement"),
        ("layers", 6, "layers of the Transformer"),
        ("embed_dim", 512, "width of the Transformer"),
    ):
        verb.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text}; default: {default}")
    verb = commands.add_parser("table", parents=[workdirs, metrics], help="report all measurements")
    verb.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help=f"write tables after the line {standings.SECTION.begin} and costs after the line {standings.COSTS.begin}",
    )
    verb.add_argument("--figure", type=Path, metavar="PNG", help="draw the losses at the best settings")
    verb.set_defaults(run=table)
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
