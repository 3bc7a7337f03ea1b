"""Compare the stored measurements of `benchmarks.optimizers`, and format the comparison as Markdown."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..framework.base.errors import UserError
from ..framework.reporting.curves import Group
from .contestants import TITLES
from .documents import Section, table
from .grid import Outcome, Trial, best_rates, by, crossings, mean

SECTION, COSTS = Section("optimizers"), Section("costs of updates")
BASELINE = "adamw"


def seconds_per_step(times: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean step time of each timed optimizer."""
    return {name: entry["mean_ms"] / 1e3 for name, entry in times.items()}


def compare(outcomes: Sequence[Outcome], missing: Sequence[Trial], times: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the runs of a grid. Return the comparison as JSON.

    A rate counts only if no seed is missing. An optimizer without such a rate is left out.

    Args:
      outcomes: the finished runs.
      missing: the missing runs.
      times: result of `timing.time_steps`; optimizers without an entry are not compared by seconds.

    Returns:
      `missing`: names of the missing runs. `rates`: mean final held-out loss of each rate. `best`: for each optimizer
      its best rate, whether this is `at_edge` of the grid, and the losses `by_seed` and their `mean`. `crossings`:
      those of `grid.crossings` from each optimizer to the baseline, and from and to our Shampoo. `at_equal_steps` and
      `at_equal_seconds`: mean losses at the end of the shortest run, best first; None for fewer than two optimizers.
      `timed_otherwise`: optimizers that were timed with other options than those of their runs.

    Raises:
      UserError: there are no runs, or an optimizer diverged with every rate.
    """
    if not outcomes:
        raise UserError("--workdir: it has no runs to compare. Run the sub-command learn first")
    cells = by(outcomes, _cell)
    lacking = by(missing, lambda trial: (trial.variant, trial.learning_rate))
    seeds = max(len(cells.get(cell, ())) + len(lacking.get(cell, ())) for cell in {*cells, *lacking})
    whole = {cell: runs for cell, runs in cells.items() if len(runs) == seeds}
    best = best_rates([outcome for runs in whole.values() for outcome in runs])
    at_best = {name: whole[name, rate] for name, rate in best.items()}
    pairs = [
        (challenger, baseline)
        for challenger, baseline in itertools.permutations(best, 2)
        if baseline == BASELINE or "ours" in (challenger, baseline)
    ]
    return {
        "missing": [trial.name for trial in missing],
        "rates": [
            {
                "optimizer": name,
                "learning_rate": rate,
                "seeds": len(runs),
                "mean_heldout_loss": mean(runs) if all(run.complete for run in runs) else None,
                "best": best.get(name) == rate,
            }
            for (name, rate), runs in sorted(
                cells.items(), key=lambda cell: (list(TITLES).index(cell[0][0]), cell[0][1])
            )
        ],
        "best": {
            name: {
                "learning_rate": best[name],
                "at_edge": best[name] in _edges([rate for other, rate in (*cells, *lacking) if other == name]),
                "mean": mean(runs),
                "by_seed": {str(run.trial.seed): run.result["heldout_loss"] for run in runs},
            }
            for name, runs in at_best.items()
        },
        "crossings": [
            entry for challenger, baseline in pairs for entry in crossings(at_best[challenger], at_best[baseline])
        ],
        "at_equal_steps": _standing(at_best, dict.fromkeys(at_best, 1.0)),
        "at_equal_seconds": _standing(at_best, seconds_per_step(times)),
        "timed_otherwise": [
            name
            for name, runs in at_best.items()
            if name in times and any(_unlike(run.run.config["optimizer"], times[name]["options"]) for run in runs)
        ],
    }


def at_their_best(outcomes: Sequence[Outcome], comparison: Mapping[str, Any]) -> list[Group]:
    """Return the runs of each optimizer at its best rate, best first."""
    ranked = sorted(comparison["best"].items(), key=lambda item: item[1]["mean"])
    return [
        Group(TITLES[name], tuple(o.run for o in outcomes if _cell(o) == (name, entry["learning_rate"])))
        for name, entry in ranked
    ]


def _cell(outcome: Outcome) -> tuple[str, float]:
    return outcome.trial.variant, outcome.trial.learning_rate


def _standing(at_best: Mapping[str, Sequence[Outcome]], per_step: Mapping[str, float]) -> dict[str, Any] | None:
    """Return the mean held-out losses at the end of the shortest run, best first. A step lasts `per_step`."""
    ends = {name: per_step[name] * runs[0].result["steps"] for name, runs in at_best.items() if name in per_step}
    if len(ends) < 2:
        return None
    at = min(ends.values())
    losses = {}
    for name in ends:
        curves = [outcome.run.curve("heldout/loss", "step") for outcome in at_best[name]]
        losses[name] = float(np.mean([np.interp(at / per_step[name], steps, values) for steps, values in curves]))
    return {
        "at": at,
        "ended": [name for name, end in ends.items() if end == at],
        "losses": dict(sorted(losses.items(), key=lambda item: item[1])),
        "steps": {name: at / per_step[name] for name in ends},
    }


def _unlike(options: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Return whether options differ. An absent option counts as off."""
    return any((options.get(key) or None) != (others.get(key) or None) for key in {*options, *others})


def _edges(rates: Sequence[float]) -> tuple[float, ...]:
    return (min(rates), max(rates)) if len(set(rates)) > 1 else ()


def markdown(comparison: dict[str, Any], times: dict[str, Any] | None, command: str) -> str:
    """Format the comparison and the step times as Markdown, and name missing measurements."""
    parts = [f"Made by `{command}`.", *_learning(comparison)]
    parts += _times(times) if times else ["Step times are not measured. Run the sub-command `time`."]
    return "\n\n".join(parts) + "\n"


def costs_markdown(costs: Sequence[dict[str, Any]]) -> str:
    """Format the costs of updates as Markdown."""
    return "\n\n".join(part for cost in costs for part in _cost(cost)) + "\n"


def _learning(comparison: dict[str, Any]) -> list[str]:
    best, rows = comparison["best"], []
    for rate in comparison["rates"]:
        loss = rate["mean_heldout_loss"]
        rows.append(
            [
                TITLES[rate["optimizer"]],
                f"{rate['learning_rate']:g}",
                str(rate["seeds"]),
                "diverged" if loss is None else f"{loss:.4f}",
                "best" if rate["best"] else "",
            ]
        )
    seeds = sorted({seed for entry in best.values() for seed in entry["by_seed"]}, key=int)
    finals = [
        [
            TITLES[name],
            f"{entry['learning_rate']:g}",
            f"{entry['mean']:.4f}",
            *(f"{entry['by_seed'][seed]:.4f}" if seed in entry["by_seed"] else "-" for seed in seeds),
        ]
        for name, entry in sorted(best.items(), key=lambda item: item[1]["mean"])
    ]
    crossings = [
        [
            TITLES[entry["variant"]],
            f"{TITLES[entry['reaches']]}, {entry['target']:.4f}",
            str(entry["seed"]),
            _number(entry["steps"], ",.0f", "not reached"),
            _number(entry["fraction_of_steps"], ".1%", ""),
            _number(entry["seconds"], ",.1f", "" if entry["steps"] is None else "not measured"),
            _number(entry["fraction_of_seconds"], ".1%", ""),
        ]
        for entry in comparison["crossings"]
    ]
    return [
        *([f"Missing runs: {', '.join(comparison['missing'])}."] if comparison["missing"] else []),
        _ahead(comparison["at_equal_steps"], "steps"),
        _ahead(comparison["at_equal_seconds"], "seconds"),
        *(
            f"{TITLES[name]} was timed with other options than those of its runs. Measure its time again."
            for name in comparison["timed_otherwise"]
        ),
        "Final held-out loss at the best learning rate (nats per token):",
        table(["optimizer", "learning rate", "mean", *(f"seed {seed}" for seed in seeds)], finals),
        *(
            f"The best learning rate of {TITLES[name]} is at the edge of its grid: a better one may be outside."
            for name, entry in best.items()
            if entry["at_edge"]
        ),
        "Step at which each optimizer reaches the mean final loss of another (interpolated between evaluations; "
        "seconds are steps x mean step time; shares are of the other's whole run):",
        table(["optimizer", "reaches final loss of", "seed", "steps", "share", "seconds", "share"], crossings),
        "Every learning rate, mean over seeds:",
        table(["optimizer", "learning rate", "seeds", "held-out loss", ""], rows),
    ]


def _ahead(standing: dict[str, Any] | None, unit: str) -> str:
    if standing is None:
        return f"There are not enough runs to compare at equal {unit}."
    leader, *others = standing["losses"].items()
    amount = f"{standing['at']:,.0f} steps" if unit == "steps" else f"{standing['at']:,.1f} seconds"
    followed = ", ".join(f"{TITLES[name]} {loss:.4f}" for name, loss in others)
    sentence = f"At equal {unit}, {amount}, {TITLES[leader[0]]} is ahead with {leader[1]:.4f}; then {followed}."
    unfinished = [
        f"{TITLES[name]} at step {steps:,.0f}"
        for name, steps in standing["steps"].items()
        if name not in standing["ended"]
    ]
    if unfinished:
        ended = " and ".join(TITLES[name] for name in standing["ended"])
        sentence += f" {ended} has finished its schedule then; the others have not: {', '.join(unfinished)}."
    return sentence


def _times(times: dict[str, Any]) -> list[str]:
    rows = [
        [
            _title(name),
            f"{entry['median_ms']:.1f}",
            f"{entry['mean_ms']:.1f}",
            f"{entry['longest_ms']:.1f}",
            f"{entry['longest_to_median']:.2f}",
            f"{entry['slowest_phase_to_median']:.2f}",
            *_compilation(entry),
        ]
        for name, entry in times["optimizers"].items()
    ]
    steps = min(entry["steps"] for entry in times["optimizers"].values())
    return [
        f"Train steps of the same model, at least {steps} per optimizer in turns of {times['interval']} "
        f"({times['device']}). Means are over a whole run; other columns are over steps after the early intervals. The "
        "slowest phase is the longest of the interval's steps, after taking the median of each over all turns:",
        table(
            ["optimizer", "median ms", "mean ms", "longest ms", "/ median", "slowest phase / median", *_COMPILATION],
            rows,
        ),
    ]


def _cost(cost: dict[str, Any]) -> list[str]:
    optimizers = cost["optimizers"]
    rows = [
        [
            _title(name),
            " ".join(f"{mean:,.1f}" for mean in entry["mean_ms"]),
            f"{np.mean(entry['mean_ms']) / np.mean(optimizers['ours']['mean_ms']):.2f}",
            *_compilation(entry),
        ]
        for name, entry in optimizers.items()
    ]
    parts = [
        f"Updates alone, for a Transformer of {cost['parameters'] / 1e6:.1f} M parameters, block size "
        f"{cost['block_size']}, interval {cost['interval']}, random gradients ({cost['device']}). Milliseconds are "
        f"means over {cost['intervals']} intervals, one for each repetition:",
        table(["optimizer", "ms", "/ ours", *_COMPILATION], rows),
    ]
    eigh = cost["eigh"]
    if eigh is not None and eigh["stopped"]:
        parts.append(f"Our Shampoo with the solver eigh: {eigh['stopped']}.")
    elif eigh is not None:
        means = {name: float(np.mean(entry["mean_ms"])) for name, entry in eigh["optimizers"].items()}
        parts.append(
            f"Our Shampoo takes {means['ours_eigh']:,.1f} ms with the solver eigh, and {means['ours']:,.1f} ms with "
            "newton in the same run."
        )
    return parts


_COMPILATION = ("trace + compile s", "HLO instructions", "StableHLO characters", "state MB")


def _compilation(entry: dict[str, Any]) -> list[str]:
    return [
        f"{entry['trace_seconds'] + entry['compile_seconds']:.1f}",
        f"{entry['hlo_instructions']:,}",
        f"{entry['stablehlo_characters']:,}",
        f"{entry['state_bytes'] / 1e6:.1f}",
    ]


def _title(name: str) -> str:
    if name in TITLES:
        return TITLES[name]
    of, _, kind = name.rpartition("_")
    return f"{TITLES[of]}, {kind}"


def _number(value: float | None, form: str, absent: str) -> str:
    return absent if value is None else format(value, form)
