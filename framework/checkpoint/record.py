"""The record of a run: what the host knows beside the train state. Every checkpoint holds it as JSON."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from ..base.errors import UserError
from ..base.values import convert

# Words in the names of metrics that are good when low, and when high; the last one in a name decides.
_LOW = ("loss", "perplexity", "error", "rmse", "mae", "nats", "bits")
_HIGH = ("accuracy", "top5", "auc", "bleu", "chrf", "rouge", "f1", "precision", "recall", "reward")


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Orders evaluations by a held-out metric.

    Attributes:
      metric: its name.
      mode: "min" if low values are good, "max" if high ones are.
    """

    metric: str = "loss"
    mode: str = "min"

    @classmethod
    def of(cls, metric: str, mode: str) -> "Ranking":
        """Return the ranking by a metric; mode "auto" takes its direction from its name.

        Raises:
          UserError: the name does not tell the direction.
        """
        if mode == "auto":
            words = [word for word in re.split("[^a-z0-9]", metric.lower()) if word in _LOW + _HIGH]
            mode = ("min" if words[-1] in _LOW else "max") if words else ""
        if mode not in ("min", "max"):
            raise UserError(
                f"config.evaluation.best_metric={metric!r}: its direction is not known. Set "
                "config.evaluation.best_mode to min or max."
            )
        return cls(metric, mode)

    def rank(self, values: Mapping[str, float]) -> float | None:
        """Return a number that is low for good evaluations; None if the metric is missing or not finite."""
        value = values.get(self.metric, math.nan)
        return self.value(value) if math.isfinite(value) else None

    def value(self, rank: float) -> float:
        """Return the value of the metric for a rank, or the rank for a value."""
        return rank if self.mode == "min" else -rank


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out metrics by name, and the step after which they were measured."""

    step: int
    values: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Record:
    """The progress of a run, as the host knows it.

    Attributes:
      step: steps taken.
      seconds: training time, without evaluation, saving and compilation.
      tokens: tokens trained on.
      last: the latest evaluation, None before the first.
      best: the best evaluation so far.
      skipped: steps that the guard has skipped.
      began: the step after which the run of this workdir began.
      optimizer_began: accepted steps before the optimizer began; above 0 if it replaced another one.
      data: fingerprint of the training data, "" if they have none.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    last: Evaluation | None = None
    best: Evaluation | None = None
    skipped: int = 0
    began: int = 0
    optimizer_began: int = 0
    data: str = ""

    @property
    def evaluated(self) -> bool:
        """Whether the latest evaluation is of this step."""
        return self.last is not None and self.last.step == self.step

    def with_evaluation(self, values: dict[str, float], ranking: Ranking) -> "Record":
        """Return this record after an evaluation of its step, which becomes `best` only if it ranks lower."""
        new = Evaluation(self.step, values)
        rank = ranking.rank(values)
        before = ranking.rank(self.best.values) if self.best else None
        better = self.best is None or (rank is not None and (before is None or rank < before))
        return dataclasses.replace(self, last=new, best=new if better else self.best)

    def rank(self, ranking: Ranking) -> float | None:
        """Return the rank of this step's evaluation; None without an evaluation or if its metric is not finite."""
        return ranking.rank(self.last.values) if self.last is not None and self.evaluated else None

    @classmethod
    def from_json(cls, content: Any) -> "Record":
        """Return the record of which `dataclasses.asdict` has made the content.

        Raises:
          ValueError: the content is not a record.
        """
        try:
            record = convert(content, cls)
        except TypeError:
            raise ValueError("the record has other fields or types") from None
        numbers = [value for value in vars(record).values() if isinstance(value, int | float)]
        if not all(0 <= number < math.inf for number in numbers):
            raise ValueError(f"the record has a negative or infinite number: {numbers}")
        return record
