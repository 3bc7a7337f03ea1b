"""Describe a grid of learning rates and seeds; find the best rate of each variant and when it reaches the others."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..framework.base.errors import UserError
from ..framework.reporting import curves
from ..framework.reporting.runs import Run


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a grid: a variant with a learning rate and a seed."""

    variant: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its workdir."""
        return f"{self.variant}-lr{self.learning_rate:g}-seed{self.seed}"

    @property
    def settings(self) -> tuple[str, str]:
        """Changes to the variant's config, as "key=value"."""
        return f"schedule.learning_rate={self.learning_rate}", f"seed={self.seed}"


@dataclasses.dataclass(frozen=True)
class Metric:
    """A held-out metric, compared at the end of runs. `higher`: larger values are better."""

    name: str = "loss"
    higher: bool = False

    def of(self, result: Mapping[str, Any]) -> float:
        """Return its value in the content of a `result.json`.

        Raises:
          UserError: the result lacks it.
        """
        value = result.get("heldout_loss" if self.name == "loss" else self.name)
        if value is None:
            raise UserError(f"--metric={self.name}: a run has no such held-out metric. It has: {', '.join(result)}")
        return value

    def falling(self, value: Any) -> Any:
        """Negate values if higher is better, so that lower is better."""
        return -value if self.higher else value


LOSS = Metric()
FINALISTS = "number of best learning rates to train with the other seeds; 0, the default: all"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished trial. `result` is the content of its `result.json`."""

    trial: Trial
    run: Run
    result: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether the run trained to its end with a finite loss."""
        return self.result["stopped"] is None and self.result["heldout_loss"] is not None


def best_rates(outcomes: Sequence[Outcome], metric: Metric = LOSS) -> dict[str, float]:
    """Return the best rate of each variant (see `ranking`), among the rates that have runs for the most seeds.

    Raises:
      UserError: a variant diverged with every rate.
    """
    best = {}
    for variant, of_variant in by(outcomes, lambda outcome: outcome.trial.variant).items():
        rates = by(of_variant, lambda outcome: outcome.trial.learning_rate)
        most = max(len(runs) for runs in rates.values())
        ranked = ranking([run for runs in rates.values() if len(runs) == most for run in runs], metric)
        if not ranked:
            raise UserError(f"--learning_rates: {variant} diverged with all of {sorted(rates)}. Try lower rates")
        best[variant] = ranked[0]
    return best


def rounds(seeds: Sequence[int], count: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return (seeds for all learning rates, seeds for the `count` finalists only); the latter is empty for count 0."""
    return (seeds[:1], seeds[1:]) if count else (seeds, ())


def finalists(outcomes: Sequence[Outcome], metric: Metric, count: int) -> dict[str, list[float]]:
    """Return the `count` best learning rates of each variant, by the mean of the final metric.

    Raises:
      UserError: fewer rates of a variant ended with a finite loss.
    """
    found: dict[str, list[float]] = {}
    for variant, of_variant in by(outcomes, lambda outcome: outcome.trial.variant).items():
        ranked = ranking(of_variant, metric)
        if len(ranked) < count:
            raise UserError(f"--finalists={count}: {variant} diverged with all rates except {ranked}. Try lower rates")
        found[variant] = ranked[:count]
    return found


def ranking(outcomes: Sequence[Outcome], metric: Metric) -> list[float]:
    """Return one variant's learning rates by the mean of the final metric over seeds, best first.

    Rates with a diverged seed are left out.
    """
    rates = by(outcomes, lambda outcome: outcome.trial.learning_rate)
    means = {rate: mean(runs, metric) for rate, runs in rates.items() if all(run.complete for run in runs)}
    return sorted(means, key=lambda rate: metric.falling(means[rate]))


def mean(outcomes: Sequence[Outcome], metric: Metric = LOSS) -> float:
    """Return the mean of the final held-out metric."""
    return float(np.mean([metric.of(outcome.result) for outcome in outcomes]))


def crossings(
    challengers: Sequence[Outcome], baselines: Sequence[Outcome], metric: Metric = LOSS
) -> list[dict[str, Any]]:
    """Find when each challenger's held-out metric reaches the baselines' mean final metric. Return one entry for each.

    `steps` and `seconds` are interpolated linearly between the evaluations around the crossing. `evaluated_at` is the
    step of the first evaluation that is as good as the target. Fractions are of the baselines' mean steps and seconds.
    All are None if the challenger never reaches the target.
    """
    target = mean(baselines, metric)
    whole_steps = float(np.mean([outcome.result["steps"] for outcome in baselines]))
    whole_seconds = float(np.mean([outcome.result["seconds"] for outcome in baselines]))
    entries = []
    for challenger in challengers:
        steps, values = challenger.run.curve(f"heldout/{metric.name}", "step")
        seconds, timed = challenger.run.curve(f"heldout/{metric.name}", "seconds")
        falling, wanted = metric.falling(values), metric.falling(target)
        at_step = curves.reach(steps, falling, wanted)
        at_second = curves.reach(seconds, metric.falling(timed), wanted)
        entries.append(
            {
                "variant": challenger.trial.variant,
                "reaches": baselines[0].trial.variant,
                "target": target,
                "seed": challenger.trial.seed,
                "steps": at_step,
                "evaluated_at": None if at_step is None else int(steps[falling <= wanted][0]),
                "fraction_of_steps": None if at_step is None else at_step / whole_steps,
                "seconds": at_second,
                "fraction_of_seconds": None if at_second is None else at_second / whole_seconds,
            }
        )
    return entries


def by(items: Sequence[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Group items by key, in the order of first occurrence."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
