"""A grid of learning rates and seeds: its runs, the best rate of each contestant, and who gets where how soon."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..framework.base.errors import UserError
from ..framework.reporting import curves
from ..framework.reporting.runs import Run


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of the grid: a variant with a learning rate and a seed."""

    variant: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its workdir."""
        return f"{self.variant}-lr{self.learning_rate:g}-seed{self.seed}"

    @property
    def settings(self) -> tuple[str, str]:
        """What it changes in its variant's config, as "key=value"."""
        return f"schedule.learning_rate={self.learning_rate}", f"seed={self.seed}"


@dataclasses.dataclass(frozen=True)
class Metric:
    """A held-out metric that runs are compared by, as it is at their end; `higher` says that more of it is better."""

    name: str = "loss"
    higher: bool = False

    def of(self, result: Mapping[str, Any]) -> float:
        """Its value in the content of a `result.json`.

        Raises:
          UserError: it is not there.
        """
        value = result.get("heldout_loss" if self.name == "loss" else self.name)
        if value is None:
            raise UserError(f"a run has no held-out {self.name}; there is {', '.join(result)}")
        return value

    def falling(self, value: Any) -> Any:
        """Values of it so that less is better."""
        return -value if self.higher else value


LOSS = Metric()
FINALISTS = "learning rates of each to go on with after the first seed; 0, the default, is all"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a trial; `result` is the content of its `result.json`."""

    trial: Trial
    run: Run
    result: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether it trained to its end with a finite loss; a run that diverged did not."""
        return self.result["stopped"] is None and self.result["heldout_loss"] is not None


def best_rates(outcomes: Sequence[Outcome], metric: Metric = LOSS) -> dict[str, float]:
    """For each variant the first of `ranking`, among the learning rates that most seeds were run with.

    Raises:
      UserError: no rate of a variant is eligible.
    """
    best = {}
    for variant, of_variant in by(outcomes, lambda outcome: outcome.trial.variant).items():
        rates = by(of_variant, lambda outcome: outcome.trial.learning_rate)
        most = max(len(runs) for runs in rates.values())
        ranked = ranking([run for runs in rates.values() if len(runs) == most for run in runs], metric)
        if not ranked:
            raise UserError(f"{variant} diverged with every one of {sorted(rates)}; try lower --learning_rates")
        best[variant] = ranked[0]
    return best


def rounds(seeds: Sequence[int], count: int) -> tuple[Sequence[int], Sequence[int]]:
    """Seeds that every learning rate is tried with, and those that only `count` finalists go on with; 0 spares none."""
    return (seeds[:1], seeds[1:]) if count else (seeds, ())


def finalists(outcomes: Sequence[Outcome], metric: Metric, count: int) -> dict[str, list[float]]:
    """The `count` best learning rates of each variant, by the mean of the metric at the end.

    Raises:
      UserError: fewer rates of a variant ended with a finite loss.
    """
    found: dict[str, list[float]] = {}
    for variant, of_variant in by(outcomes, lambda outcome: outcome.trial.variant).items():
        ranked = ranking(of_variant, metric)
        if len(ranked) < count:
            raise UserError(f"{variant} diverged with all rates but {ranked}, --finalists is {count}; try lower rates")
        found[variant] = ranked[:count]
    return found


def ranking(outcomes: Sequence[Outcome], metric: Metric) -> list[float]:
    """Learning rates of one variant's runs by the mean of the metric at their end, over all seeds, the best first.

    A rate with which any seed diverged is not eligible.
    """
    rates = by(outcomes, lambda outcome: outcome.trial.learning_rate)
    means = {rate: mean(runs, metric) for rate, runs in rates.items() if all(run.complete for run in runs)}
    return sorted(means, key=lambda rate: metric.falling(means[rate]))


def mean(outcomes: Sequence[Outcome], metric: Metric = LOSS) -> float:
    """Mean of the held-out metric at the end."""
    return float(np.mean([metric.of(outcome.result) for outcome in outcomes]))


def crossings(
    challengers: Sequence[Outcome], baselines: Sequence[Outcome], metric: Metric = LOSS
) -> list[dict[str, Any]]:
    """When each challenger's held-out metric comes to the baselines' mean at their end; one entry for each.

    `steps` and `seconds` are interpolated linearly between the evaluations around the crossing,
    `evaluated_at` is the step of the first evaluation that is as good as the target, fractions are of the
    baselines' mean steps and seconds; None where the challenger never gets there.
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
    """Items by their key, in the order in which keys first come."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
