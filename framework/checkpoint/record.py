"""What the host knows of a run beside the train state: saved with every checkpoint, as JSON."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out metrics by name, and the step they were measured after."""

    step: int
    values: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Record:
    """What the host knows of a run.

    Attributes:
      step: steps taken.
      seconds: training time, evaluation, saving and compilation left out.
      tokens: tokens trained on.
      last: the latest evaluation, if there was one.
      best: the best evaluation so far, by the config's best metric.
      skipped: steps that the guard has skipped.
      began: the step that the run of this workdir began after.
      optimizer_began: accepted steps that lay behind the run when its optimizer began: above 0 where it took the place
        of another one.
      batches_passed_over: batches that were left out by rolling back; step t trains on batch t + this number.
      rollbacks: how often the run went back to a checkpoint.
      data: fingerprint of the training data, "" where the data have none.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    last: Evaluation | None = None
    best: Evaluation | None = None
    skipped: int = 0
    began: int = 0
    optimizer_began: int = 0
    batches_passed_over: int = 0
    rollbacks: int = 0
    data: str = ""

    @property
    def evaluated(self) -> bool:
        """Whether the latest evaluation is that of this step."""
        return self.last is not None and self.last.step == self.step

    def with_evaluation(self, values: dict[str, float], best_metric: str) -> "Record":
        """This record after an evaluation at its step; `best` is kept where the metric is not lower, or not finite."""
        new = Evaluation(self.step, values)

        def rank(evaluation: Evaluation) -> float:
            value = evaluation.values.get(best_metric, math.inf)
            return value if math.isfinite(value) else math.inf

        better = self.best is None or rank(new) < rank(self.best)
        return dataclasses.replace(self, last=new, best=new if better else self.best)

    def score(self, metric: str) -> float | None:
        """A held-out metric measured at this very step; None where it was not, or is not finite."""
        value = self.last.values.get(metric) if self.last is not None and self.evaluated else None
        return value if value is not None and math.isfinite(value) else None

    def rolled_back(self, now: "Record", spike: int) -> "Record":
        """This record of an earlier step, to go on from when step number `spike` was one too many.

        The batches of the steps in between are passed over, that of the spike included.
        """
        return dataclasses.replace(
            self,
            seconds=now.seconds,
            rollbacks=now.rollbacks + 1,
            batches_passed_over=now.batches_passed_over + spike - self.step,
        )

    def to_json(self) -> dict[str, Any]:
        """As plain dicts."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> "Record":
        """The inverse of `to_json`.

        Raises:
          ValueError: it is no record.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"no record of a run: {type(content).__name__}")
        values = dict(content)
        for field in dataclasses.fields(cls):
            if field.name not in values:
                raise ValueError(f"no record of a run: {field.name} is missing")
            value = values[field.name]
            if field.name in ("last", "best"):
                values[field.name] = None if value is None else _evaluation(value)
            elif isinstance(field.default, float):
                values[field.name] = _number(value, field.name)
            elif isinstance(field.default, int):
                _whole(value, field.name)
            elif not isinstance(value, str):
                raise ValueError(f"no record of a run: {field.name} is {value!r:.50}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"no record of a run: {error}") from error


def _evaluation(content: Any) -> Evaluation:
    values = content.get("values") if isinstance(content, Mapping) else None
    if not isinstance(content, Mapping) or not isinstance(values, Mapping):
        raise ValueError(f"no evaluation: {content!r:.50}")
    step = _whole(content.get("step"), "the step of an evaluation")
    return Evaluation(step, {name: _number(value, name, finite=False) for name, value in values.items()})


def _whole(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"no record of a run: {name} is {value!r:.50}")
    return value


def _number(value: Any, name: str, *, finite: bool = True) -> float:
    # Whole numbers have no bound in JSON, and those beyond the largest float cannot become one.
    fits = type(value) is float or (type(value) is int and abs(value) < 2**63)
    if not fits or (finite and not math.isfinite(value)):
        raise ValueError(f"no record of a run: {name} is {value!r:.50}")
    return float(value)
