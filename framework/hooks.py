"""Hooks run when training pauses: save, compile, evaluate, sample, profile. Add a feature of the loop as a hook."""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import dataset
from .base.durations import Countdown, Period
from .data.feed import Heldout
from .dataset import Codec
from .distributed import agreement, console
from .generation.generator import Generator
from .generation.sampling import Sampling
from .generation.texts import Text
from .loop import Hook, Run, storage_faults
from .reporting.profiling import Profile
from .setup import Blueprint
from .step.evaluation import evaluate, of_set, predict
from .task import judge_of


def of(blueprint: Blueprint, profile: Profile) -> tuple[Hook, ...]:
    """Return the hooks of a run, in their order."""
    return Save(blueprint), Compile(blueprint.record.step), Evaluate(blueprint), Sample(blueprint), profile


class Save:
    """Save a checkpoint every period, some minutes after the last, at the best evaluation, at the end, at a stop."""

    def __init__(self, blueprint: Blueprint):
        section = blueprint.request.config.checkpoint
        self._period, self._on_error = Period(blueprint.in_steps(section.every)), section.on_error
        self._keeps_best = bool(section.keep_best)
        self._saved: int | None = None
        self._clock = Countdown(60 * section.every_minutes)
        self._clock.start(blueprint.record.step)

    def next(self, step: int) -> int:
        """Return the step of the next regular checkpoint, or one at which to look at the clock."""
        if not self._clock.seconds:
            return self._period.next(step)
        return min(self._period.next(step), agreement.first(lambda: self._clock.next(step)))

    def due(self, run: Run) -> bool:
        """Return whether this step has to be saved and is not."""
        improved = self._keeps_best and run.record.evaluated and run.record.best == run.record.last
        if self._saved == run.step:
            return False
        late = bool(self._clock.seconds) and agreement.first(lambda: self._clock.over)
        return bool(run.at_end or run.stopped or improved or late or self._period.due(run.step))

    def __call__(self, run: Run) -> None:
        """Save in the background."""
        self._saved = run.step
        self._clock.start(run.step)
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
    """Measure the metrics of all held-out sets. A signal ends an evaluation after the batch that is being evaluated.

    At every `judge_every` and at the end, the task also judges the predictions for all examples of a set together, on
    process 0: it may take long.
    """

    def __init__(self, blueprint: Blueprint):
        section = blueprint.request.config.evaluation
        self._period, self._judged = (
            Period(blueprint.in_steps(duration)) for duration in (section.every, section.judge_every)
        )
        self._judge = judge_of(blueprint.request.task)

    def next(self, step: int) -> int:
        """Return the step of the next evaluation."""
        return self._period.next(step)

    def due(self, run: Run) -> bool:
        """Return whether this step has to be evaluated and is not."""
        return not run.stopped and not run.record.evaluated and (run.at_end or self._period.due(run.step))

    def __call__(self, run: Run) -> None:
        """Evaluate, and record the result if the evaluation is complete."""
        values: dict[str, float] = {}
        for name, heldout in run.blueprint.feed.heldout.items():
            found = self._measured(run, heldout)
            values |= {of_set(name, metric): value for metric, value in found.items()}
            if run.stopped:
                return
        run.evaluated(values)

    def _measured(self, run: Run, heldout: Heldout) -> dict[str, float]:
        variables, judge = run.state.variables, self._judge
        values = evaluate(run.steps["evaluate"], variables, _until_stopped(run, heldout))
        if judge is None or run.stopped or not (run.at_end or self._judged.due(run.step)):
            return values
        predictions = predict(run.steps["predict"], variables, _until_stopped(run, heldout), heldout.examples)
        if run.stopped:
            return values
        judged, line = agreement.first(lambda: judge.judge(predictions, heldout.decode))
        if line:
            console.say(line)
        return values | judged


class Sample:
    """Let the model continue the prompts of the config, every period."""

    def __init__(self, blueprint: Blueprint):
        self._section = blueprint.request.config.samples
        self._period = Period(blueprint.in_steps(self._section.every))
        self._sampled: int | None = None
        self._blueprint = blueprint

    def next(self, step: int) -> int:
        """Return the step of the next samples."""
        return self._period.next(step)

    def due(self, run: Run) -> bool:
        """Return whether this step has to be sampled and is not."""
        return not run.stopped and self._sampled != run.step and self._period.due(run.step)

    def __call__(self, run: Run) -> None:
        """Generate on all processes, and write on the first."""
        self._sampled = run.step
        run.watch.at("samples", run.step)
        codec, prompts, generator = self._model
        drawn = np.stack([*generator.tokens(run.state.variables, prompts, self._section.tokens)], axis=1)
        texts = [Text(codec, prompt) for prompt in prompts]
        for text, tokens in zip(texts, drawn, strict=True):
            for token in tokens:
                text.add(int(token))
            text.end()
        given = zip(self._section.prompts, texts, strict=True)
        run.journal.sampled(run.step, [{"prompt": prompt, "text": text.text} for prompt, text in given])

    @functools.cached_property
    def _model(self) -> tuple[Codec, list[list[int]], Generator]:
        """The codec, the tokens of the prompts, and what continues them; compiled when it is first used."""
        request = self._blueprint.request
        codec = dataset.codec(request.data, request.cache)
        assert codec is not None  # `setup.build` has refused other data
        return codec, [*map(codec.encode, self._section.prompts)], Generator(request.task, request.mesh, Sampling())


def _until_stopped(run: Run, heldout: Heldout) -> Iterator[Any]:
    """Yield held-out batches until a signal arrives, which is set in `run.stopped`."""
    for batch in heldout:
        run.watch.at("evaluation", run.step)
        run.stopped = run.stopped or run.signal()
        if run.stopped:
            return
        yield batch
