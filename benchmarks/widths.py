"""Train a config at several widths and learning rates, with and without the rules of scale.

    python -m shampax.benchmarks.widths learn --widths=64,128,256,512
    python -m shampax.benchmarks.widths table --markdown=docs/optimizer.md

A width multiplies all sizes of a language model except those of a head, the depth and the vocabulary. Without the
rules, all widths have the same learning rates; with them, the option `wider` is the width over the first one. Each run
is a file in the workdir; rerun the same command to resume. JSON goes to standard output, progress to standard error.
"""

import argparse
import dataclasses
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..framework.base import workdir
from ..framework.base.errors import UserError
from ..framework.config import components
from ..framework.config.check import load
from . import command, learning
from .documents import Section, table, write
from .outcomes import Outcome
from .trials import Trial

COMMAND = "python -m shampax.benchmarks.widths"
SECTION = Section("widths")
TUNED, HEAD_DIM = 64, 32
# A run of width 512 takes a minute on one core.
SHORT = (
    "task.layers=1",
    f"task.head_dim={HEAD_DIM}",
    "batch_size=8",
    "duration='100 steps'",
    "evaluation.every='100 steps'",
    "evaluation.batches=64",
)
RULES = {"off": "without the rules", "on": "with them"}


def sizes(width: int) -> list[str]:
    """Return the config values of a model of this width."""
    return [
        f"task.embed_dim={width}",
        f"task.heads={width // HEAD_DIM}",
        f"task.kv_heads={width // HEAD_DIM}",
        f"task.mlp_dim={2 * width}",
    ]


def learn(options: argparse.Namespace) -> dict[str, Any]:
    """Train the missing runs."""
    for width in options.widths:
        config = load(options.config, [*SHORT, *options.set, *sizes(width)])
        ours = components.build(config.optimizer)
        variants = {"off": ours, "on": dataclasses.replace(ours, wider=width / TUNED)}
        workload = learning.Workload(config, options.workdir / workdir.CACHE, variants)
        programs: dict[Any, learning.Program] = {}
        for rules in options.rules:
            for rate in options.rates:
                trial = Trial.of(rules, rate=rate, momentum=ours.beta1)
                learning.run(workload, trial, options.workdir / str(width), programs)
    return {"workdir": str(options.workdir)}


def best_rate(losses: dict[float, float]) -> float:
    """Return the learning rate at the minimum of the parabola through the best rate and its neighbours.

    The parabola is in the logarithm of the rate. The rate is the best one itself if it is at an end, or beside a run
    that diverged.
    """
    rates = sorted(losses)
    at = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if not 0 < at < len(rates) - 1:
        return rates[at]
    left, middle, right = (losses[rates[i]] for i in (at - 1, at, at + 1))
    if not math.isfinite(left + right):
        return rates[at]
    shift = 0.5 * (left - right) / (left - 2 * middle + right)
    return rates[at] * (rates[at + 1] / rates[at]) ** shift


def compare(outcomes: Sequence[Outcome]) -> dict[str, dict[float, float]]:
    """Return rules -> learning rate -> final held-out loss, infinite for a diverged run."""
    losses: dict[str, dict[float, float]] = {}
    for outcome in outcomes:
        rate = dict(outcome.trial.settings)["rate"]
        losses.setdefault(outcome.trial.variant, {})[rate] = outcome.result["loss"] if outcome.complete else math.inf
    return losses


def tabulate(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the runs in the workdir. Write the tables into the --markdown file or to standard error."""
    found = {int(path.name): compare(learning.read(path)) for path in options.workdir.iterdir() if path.name.isdigit()}
    if not any(found.values()):
        raise UserError(f"--workdir={options.workdir}: it has no runs to compare. Run the sub-command learn first")
    result: dict[str, Any] = {}
    parts = [f"Made by `{COMMAND} table`. Final held-out loss, nats per byte, by learning rate; the best is bold."]
    for rules, title in RULES.items():
        by_width = {width: found[width][rules] for width in sorted(found) if rules in found[width]}
        if not by_width:
            continue
        rates = sorted({rate for losses in by_width.values() for rate in losses})
        best = {width: best_rate(losses) for width, losses in by_width.items()}
        rows = [
            [str(width), *(_cell(losses, rate) for rate in rates), f"{best[width]:.2g}"]
            for width, losses in by_width.items()
        ]
        spread = max(best.values()) / min(best.values())
        result[rules] = {"best_rates": best, "spread": spread}
        head = [f"width, {title}", *(f"{rate:g}" for rate in rates), "best rate"]
        reach = f"{min(best)} to {max(best)}"
        parts += [table(head, rows), f"From width {reach} the best rates differ by a factor of {spread:.1f} {title}."]
    text = "\n\n".join(parts) + "\n"
    if options.markdown:
        write(options.markdown, {SECTION: text})
    else:
        print(text, file=sys.stderr)
    return result


def _cell(losses: dict[float, float], rate: float) -> str:
    if rate not in losses:
        return "-"
    text = f"{losses[rate]:.3f}" if math.isfinite(losses[rate]) else "diverged"
    return f"**{text}**" if losses[rate] == min(losses.values()) else text


def main(arguments: Sequence[str]) -> int:
    """Run the command line. Return the exit code."""
    parser, verb, _ = command.learn_and_table(
        COMMAND, "Train at several widths and learning rates.", learn, tabulate, Path("runs/widths")
    )
    verb.add_argument("--widths", type=lambda text: [int(x) for x in text.split(",")], default=[64, 128, 256, 512])
    verb.add_argument("--rules", type=lambda text: text.split(","), default=[*RULES])
    verb.add_argument(
        "--rates", type=lambda text: [float(x) for x in text.split(",")], default=[0.0025, 0.005, 0.01, 0.02, 0.04]
    )
    options = parser.parse_args(arguments)
    return command.report(lambda: options.run(options))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
