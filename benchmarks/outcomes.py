"""Finished runs of a comparison: their final metric, and when one optimizer reaches another."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..framework.base.errors import UserError
from ..framework.reporting import curves
from ..framework.reporting.runs import Run
from .trials import Trial


@dataclasses.dataclass(frozen=True)
class Metric:
    """A held-out metric, compared at the end of runs. `higher`: larger values are better."""

    name: str = "loss"
    higher: bool = False

    def of(self, result: Mapping[str, Any]) -> float:
        """Return its value in the result of a run.

        Raises:
          UserError: the result lacks it.
        """
        value = result.get(self.name)
        if value is None:
            raise UserError(f"--metric={self.name}: a run has no such held-out metric. It has: {', '.join(result)}")
        return value

    def falling(self, value: Any) -> Any:
        """Negate values if higher is better, so that lower is better."""
        return -value if self.higher else value


LOSS = Metric()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished trial. `result` has its last held-out metrics by name, `steps`, and `stopped`, why it ended early."""

    trial: Trial
    run: Run
    result: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether the run trained to its end with a finite loss."""
        return self.result["stopped"] is None


def mean(outcomes: Sequence[Outcome], metric: Metric = LOSS) -> float:
    """Return the mean of the final held-out metric."""
    return float(np.mean([metric.of(outcome.result) for outcome in outcomes]))


def shares(challengers: Sequence[Outcome], baselines: Sequence[Outcome], metric: Metric) -> list[float | None]:
    """Return the share of the baselines' steps after which each challenger reaches their mean final metric.

    It is interpolated linearly between evaluations; None if the challenger never reaches the metric.
    """
    target = metric.falling(mean(baselines, metric))
    curves_of = [outcome.run.curve(f"heldout/{metric.name}", "step") for outcome in challengers]
    reached = [curves.reach(steps, metric.falling(values), target) for steps, values in curves_of]
    return [None if step is None else step / baselines[0].result["steps"] for step in reached]


def by(items: Sequence[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Group items by key, in the order of first occurrence."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
