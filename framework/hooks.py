"""Hooks run when training pauses: save, compile, evaluate, profile. Add a feature of the loop as a hook."""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from .base.durations import Period
from .distributed import console
from .loop import Hook, Run, storage_faults
from .reporting.profiling import Profile
from .setup import Blueprint
from .step.evaluation import evaluate, predict
from .task import judge_of


def of(blueprint: Blueprint, profile: Profile) -> tuple[Hook, ...]:
    """Return the hooks of a run, in their order."""
    config = blueprint.request.config
    evaluation = Evaluate(
        Period(blueprint.in_steps(config.evaluation.every)),
        Judge(blueprint, Period(blueprint.in_steps(config.evaluation.judge_every))),
    )
    save = Save(
        Period(blueprint.in_steps(config.checkpoint.every)),
        config.checkpoint.on_error,
        best=bool(config.checkpoint.keep_best),
    )
    compiled = Compile(blueprint.record.step)
    return save, compiled, evaluation, profile


class Save:
    """Save a checkpoint every period, at the best evaluation, at the end and when the run stops.

    Args:
      period: of regular checkpoints.
      on_error: "stop" the run if a checkpoint cannot be saved, or "continue" with a warning.
      best: whether the best checkpoints are kept.
    """

    def __init__(self, period: Period, on_error: str, *, best: bool):
        self._period, self._on_error, self._best = period, on_error, best
        self._saved: int | None = None

    def next(self, step: int) -> int:
        """Return the step of the next regular checkpoint."""
        return self._period.next(step)

    def due(self, run: Run) -> bool:
        """Return whether this step has to be saved and is not."""
        improved = self._best and run.record.evaluated and run.record.best == run.record.last
        return self._saved != run.step and bool(run.at_end or run.stopped or improved or self._period.due(run.step))

    def __call__(self, run: Run) -> None:
        """Save in the background."""
        self._saved = run.step
        run.watch.at("checkpoint", run.step)
        state = dataclasses.replace(run.state, opt_state=run.service.with_in_flight(run.state.opt_state))
        with storage_faults(self._on_error):
            run.saver.save(state, run.record, run.blueprint.manifest)


class Compile:
    """Wait after the first step until all functions are compiled, so that an error of the compiler costs one step."""

    def __init__(self, begin: int):
        self._first = begin + 1

    def next(self, step: int) -> int:
        """Return the step after the first one of this process."""
        return self._first if step < self._first else sys.maxsize

    def due(self, run: Run) -> bool:
        """Return whether the first step has just been taken."""
        return run.step == self._first and not run.stopped

    def __call__(self, run: Run) -> None:
        """Wait."""
        run.watch.at("compiling", run.step)
        run.steps.wait()


class Evaluate:
    """Measure the held-out metrics. A signal ends an evaluation after the batch that is being evaluated."""

    def __init__(self, period: Period, judge: "Judge"):
        self._period, self._judge = period, judge

    def next(self, step: int) -> int:
        """Return the step of the next evaluation."""
        return self._period.next(step)

    def due(self, run: Run) -> bool:
        """Return whether this step has to be evaluated and is not."""
        return not run.stopped and not run.record.evaluated and (run.at_end or self._period.due(run.step))

    def __call__(self, run: Run) -> None:
        """Evaluate, and record the result if the evaluation is complete."""
        values = evaluate(run.steps["evaluate"], run.state.variables, _heldout(run))
        if not run.stopped and self._judge.due(run):
            values |= self._judge(run)
        if not run.stopped:
            run.evaluated(values)


class Judge:
    """Measure the metrics that need the predictions for all held-out examples, as a part of an evaluation."""

    def __init__(self, blueprint: Blueprint, period: Period):
        self._judge, self._feed, self._period = judge_of(blueprint.request.task), blueprint.feed, period

    def due(self, run: Run) -> bool:
        """Return whether the task judges predictions and this step is to be judged."""
        return self._judge is not None and (run.at_end or self._period.due(run.step))

    def __call__(self, run: Run) -> dict[str, float]:
        """Return metrics by name, {} if a signal has arrived."""
        assert self._judge
        predictions = predict(run.steps["predict"], run.state.variables, _heldout(run), self._feed.heldout_examples)
        if run.stopped:
            return {}
        values, line = self._judge.judge(predictions, self._feed.decode)
        if line:
            console.say(line)
        return values


def _heldout(run: Run) -> Iterator[Any]:
    """Yield held-out batches until a signal arrives, which is set in `run.stopped`."""
    for batch in run.blueprint.feed.heldout():
        run.watch.at("evaluation", run.step)
        run.stopped = run.stopped or run.signal()
        if run.stopped:
            return
        yield batch
