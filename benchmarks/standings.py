"""Compare the stored runs of `benchmarks.optimizers` task by task, and format the comparison as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..framework.base.errors import UserError
from ..framework.reporting.curves import Group
from .contestants import title
from .documents import Section, table
from .outcomes import LOSS, Metric, Outcome, by, mean, shares

SECTION, COSTS = Section("optimizers"), Section("costs of updates")
BASELINE, OURS, RIVAL = "adamw", "ours", "muon"
OTHERS = ("embeddings", "schedule")  # settings that are shown where they are not the config's


def at_their_best(outcomes: Sequence[Outcome], metric: Metric = LOSS) -> dict[str, list[Outcome]]:
    """Return the runs of each optimizer with the settings that are best under its first seed, one for each seed.

    An optimizer whose runs all diverged is left out.
    """
    best = {}
    for name, runs in by(outcomes, lambda outcome: outcome.trial.variant).items():
        seeds = [run.trial.seed for run in runs]
        first = [run for run in runs if run.complete and run.trial.seed == min(seeds)]
        if first:
            chosen = min(first, key=lambda run: metric.falling(metric.of(run.result))).trial
            best[name] = sorted(
                (run for run in runs if run.complete and run.trial == chosen.but(run.trial.seed)),
                key=lambda run: run.trial.seed,
            )
    return best


def compare(outcomes: Sequence[Outcome], equal: Sequence[Outcome], metric: Metric = LOSS) -> dict[str, Any]:
    """Compare the runs of a task. Return the comparison as JSON.

    Args:
      outcomes: the finished runs.
      equal: runs at the best settings that took equal seconds.
      metric: the final held-out metric to compare by.

    Returns:
      `steps` of a run. `optimizers`, best first: settings, number of settings `tried`, losses `by_seed` and their
      `mean`, whether the best rate is `at_edge` of its ladder, and the `shares` of AdamW's steps after which each seed
      reaches AdamW's mean final loss, and from the runs of equal seconds `equal_steps` and `equal_mean`, None without
      them. `leads`: see `_leads`.

    Raises:
      UserError: there are no runs.
    """
    best = at_their_best(outcomes, metric)
    if not best:
        raise UserError("--workdir: it has no runs to compare. Run the sub-command learn first")
    means = {name: mean(runs, metric) for name, runs in best.items()}
    at_equal = at_their_best(equal, metric)
    order = sorted(means, key=lambda name: metric.falling(means[name]))
    entries = {}
    for name in order:
        runs, tried = best[name], [o for o in outcomes if o.trial.variant == name]
        first = [o for o in tried if o.trial.seed == runs[0].trial.seed]
        rates = [dict(o.trial.settings)["rate"] for o in first]
        chosen, timed = dict(runs[0].trial.settings), at_equal.get(name)
        entries[name] = {
            "settings": chosen,
            "tried": len(first),
            "at_edge": len(set(rates)) > 1 and chosen["rate"] in (min(rates), max(rates)),
            "mean": means[name],
            "by_seed": {str(run.trial.seed): metric.of(run.result) for run in runs},
            "shares": shares(runs, best[BASELINE], metric) if name != BASELINE and BASELINE in best else [],
            "equal_steps": timed[0].result["steps"] if timed else None,
            "equal_mean": mean(timed, metric) if timed else None,
        }
    return {
        "steps": best[order[0]][0].result["steps"],
        "metric": metric.name,
        "optimizers": entries,
        "leads": _leads(entries, metric),
    }


def _leads(entries: Mapping[str, Any], metric: Metric) -> list[dict[str, Any]]:
    """Compare our mean with those of the best other optimizer and of Muon.

    Returns:
      For each: `over`, its name; `gap`, positive if ours is better; `spread`, the larger of the two ranges over seeds,
      or None if one of the two has one seed.
    """
    leads = []
    for other in dict.fromkeys([*[name for name in entries if name != OURS][:1], RIVAL]):
        if OURS in entries and other in entries:
            pair = [entries[OURS], entries[other]]
            ranges = [max(entry["by_seed"].values()) - min(entry["by_seed"].values()) for entry in pair]
            spread = max(ranges) if all(len(entry["by_seed"]) > 1 for entry in pair) else None
            gap = metric.falling(pair[1]["mean"]) - metric.falling(pair[0]["mean"])
            leads.append({"over": other, "gap": gap, "spread": spread})
    return leads


def groups(outcomes: Sequence[Outcome], metric: Metric = LOSS) -> list[Group]:
    """Return the runs of each optimizer at its best settings, best first."""
    best = at_their_best(outcomes, metric)
    ranked = sorted(best, key=lambda name: metric.falling(mean(best[name], metric)))
    return [Group(title(name), tuple(run.run for run in best[name])) for name in ranked]


def markdown(comparisons: Mapping[str, dict[str, Any]], times: Mapping[str, Any], command: str) -> str:
    """Format the comparison of each task, by title, and the step times of the tasks that have them."""
    parts = [f"Made by `{command}`."]
    for task, comparison in comparisons.items():
        parts += _task(task, comparison)
        if task in times:
            parts += _times(times[task])
    return "\n\n".join(parts) + "\n"


def costs_markdown(costs: Sequence[dict[str, Any]]) -> str:
    """Format the costs of updates as Markdown."""
    return "\n\n".join(part for cost in costs for part in _cost(cost)) + "\n"


def _task(heading: str, comparison: dict[str, Any]) -> list[str]:
    entries = comparison["optimizers"]
    seeds = sorted({seed for entry in entries.values() for seed in entry["by_seed"]}, key=int)
    rows = [
        [
            title(name),
            f"{entry['mean']:.4f}" + ("" if len(entry["by_seed"]) == len(seeds) else " (some seeds missing)"),
            *(f"{entry['by_seed'][seed]:.4f}" if seed in entry["by_seed"] else "-" for seed in seeds),
            f"{entry['settings']['rate']:g}" + (" (edge)" if entry["at_edge"] else ""),
            f"{entry['settings']['momentum']:g}",
            "yes" if entry["settings"]["nesterov"] else "no",
            " ".join(f"{key} {entry['settings'][key]}" for key in OTHERS if key in entry["settings"]) or "-",
            str(entry["tried"]),
            _shares(entry["shares"]),
            f"{entry['equal_mean']:.4f} ({entry['equal_steps']:,} steps)" if entry["equal_steps"] else "-",
        ]
        for name, entry in entries.items()
    ]
    of_seeds = [f"seed {seed}" for seed in seeds]
    columns = ["optimizer", "mean", *of_seeds, "rate", "momentum", "Nesterov", "others", "settings tried"]
    columns += ["AdamW's loss after", "at equal seconds"]
    parts = [" ".join([f"**{heading}.**", *map(_sentence, comparison["leads"])])]
    return [*parts, table(columns, rows)]


def _sentence(lead: Mapping[str, Any]) -> str:
    gap, spread, other = lead["gap"], lead["spread"], title(lead["over"])
    stated = f"Ours is {'ahead of' if gap > 0 else 'behind'} {other} by {abs(gap):.4f}"
    if spread is None:
        return f"{stated}, with one seed, which does not decide."
    doubt = "" if abs(gap) > spread else " This is within what seeds do."
    return f"{stated}; seeds differ by up to {spread:.4f}.{doubt}"


def _shares(reached: Sequence[float | None]) -> str:
    if not reached:
        return "-"
    known = [share for share in reached if share is not None]
    if len(known) < len(reached):
        return f"not reached by {len(reached) - len(known)} of {len(reached)} seeds"
    return " ".join(f"{share:.0%}" for share in known)


def _times(times: dict[str, Any]) -> list[str]:
    rows = [
        [
            title(name),
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
        f"Its train steps, at least {steps} per optimizer in turns of {times['interval']} ({times['device']}). Means "
        "are over a whole run; other columns are over steps after the early intervals. The slowest phase is the "
        "longest of the interval's steps, after taking the median of each over all turns:",
        table(
            ["optimizer", "median ms", "mean ms", "longest ms", "/ median", "slowest phase / median", *_COMPILATION],
            rows,
        ),
    ]


def _cost(cost: dict[str, Any]) -> list[str]:
    optimizers = cost["optimizers"]
    rows = [
        [
            title(name),
            " ".join(f"{mean:,.1f}" for mean in entry["mean_ms"]),
            f"{np.mean(entry['mean_ms']) / np.mean(optimizers[OURS]['mean_ms']):.2f}",
            *_compilation(entry),
        ]
        for name, entry in optimizers.items()
    ]
    return [
        f"Updates alone, for a Transformer of {cost['parameters'] / 1e6:.1f} M parameters, block size "
        f"{cost['block_size']}, interval {cost['interval']}, random gradients ({cost['device']}). Milliseconds are "
        f"means over {cost['intervals']} intervals, one for each repetition:",
        table(["optimizer", "ms", "/ ours", *_COMPILATION], rows),
    ]


_COMPILATION = ("trace + compile s", "HLO instructions", "StableHLO characters", "state MB")


def _compilation(entry: dict[str, Any]) -> list[str]:
    return [
        f"{entry['trace_seconds'] + entry['compile_seconds']:.1f}",
        f"{entry['hlo_instructions']:,}",
        f"{entry['stablehlo_characters']:,}",
        f"{entry['state_bytes'] / 1e6:.1f}",
    ]
