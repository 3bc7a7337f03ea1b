"""The training loop. Only this module changes the train state and the record of a run.

Training pauses at the steps that hooks ask for. At a pause the hooks run in their order, saving first.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from . import optimizer
from .base.durations import Period
from .base.errors import TrainingStopped, UserError
from .checkpoint.saving import Checkpoints, SaveError
from .distributed import agreement, console
from .distributed.signals import StopSignals
from .reporting.journal import Journal
from .reporting.metrics import MetricsWriter
from .reporting.progress import Clock, Speedometer
from .reporting.trackers.choice import tracked
from .reporting.trackers.relay import Relay
from .reporting.watchdog import Watchdog
from .setup import Blueprint
from .step.state import TrainState

_LOOKING_SECONDS = 0.2  # between looks for rows that are being made


class Hook(Protocol):
    """Something that happens when training pauses."""

    def next(self, step: int) -> int:
        """Return the first step after `step` at which training has to pause for this hook."""
        ...

    def due(self, run: "Run") -> bool:
        """Return whether the hook has something to do at this pause."""
        ...

    def __call__(self, run: "Run") -> None:
        """Do it."""
        ...


def train_to_end(run: "Run", hooks: Sequence[Hook]) -> None:
    """Train until the run is complete or has to stop. The first hook saves: it runs once more after the others."""
    while True:
        for hook in (*hooks, hooks[0]):
            if hook.due(run):
                hook(run)
        if run.at_end or run.stopped:
            return
        run.advance(min(hook.next(run.step) for hook in hooks))


class Run:
    """A run in progress.

    Attributes:
      blueprint: what the run consists of.
      steps: its functions, which are being compiled.
      state: the train state.
      record: what the host knows beside the state.
      step: number of steps taken.
      stopped: why the run stops early: a signal, a fault of the optimizer's service, a decision of the guard, rows that
        cannot be made; or None.
      saver: saves checkpoints.
      service: what the optimizer does on the host.
      journal: reports metrics.
      watch: the watchdog.
    """

    def __init__(self, blueprint: Blueprint, state: TrainState, watch: Watchdog, still_ours: Callable[[], None]):
        config, start = blueprint.request.config, blueprint.record
        self.blueprint, self.state, self.record, self.watch = blueprint, state, start, watch
        self.steps = blueprint.steps
        self.step = start.step
        self.stopped: str | optimizer.ServiceError | UserError | None = None
        self._made = 0  # batches that exist, at least
        self._clock = Clock(start.seconds)
        self._signals = StopSignals()
        self.service = optimizer.service(blueprint.program.tx, blueprint.program.abstract.params)
        self.saver = Checkpoints(
            blueprint.request.workdir,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            keep_every=blueprint.in_steps(config.checkpoint.keep_every),
            ranking=blueprint.ranking,
            still_ours=still_ours,
            before_commit=lambda: self.journal.settle(),
        )
        self.journal = self._journal()
        self._batches = blueprint.feed.train(start.step)
        self._open = contextlib.ExitStack()

    def _journal(self) -> Journal:
        request, record = self.blueprint.request, self.record
        pace = {"total_steps": self.blueprint.total_steps, "tokens_per_step": self.blueprint.tokens_per_step}
        writer = None
        if jax.process_index() == 0:
            told = tracked(request.workdir, request.config) if request.trackers else None
            trackers = [Relay(name, section, told) for name, section in request.trackers.items() if told]
            writer = MetricsWriter(request.workdir, trackers, after_step=record.step, evaluated=record.evaluated)
        flops = request.task.flops(self.blueprint.feed.batch_spec)
        examples = request.config.batch_size
        return Journal(
            writer,
            Speedometer(request.mesh, examples_per_step=examples, flops_per_step=flops, **pace),
            self._clock,
            (self.service, self.saver),
            start=record,
            period=Period(self.blueprint.in_steps(request.config.log.every)),
            by_layer=optimizer.by_layer(self.blueprint.program.tx, self.blueprint.program.abstract.params),
            **pace,
        )

    def __enter__(self):
        self._open.enter_context(self._signals)
        self._open.callback(lambda: self.journal.close(complete=self.at_end))
        for each in (self.saver, self.service, self._batches):
            self._open.enter_context(contextlib.closing(each))
        self.state = dataclasses.replace(self.state, opt_state=self.service.start(self.state.opt_state))
        return self

    def __exit__(self, *exception):
        return self._open.__exit__(*exception)

    @property
    def at_end(self) -> bool:
        """Whether all steps are taken."""
        return self.step == self.blueprint.total_steps

    def signal(self) -> str | None:
        """Return the name of the signal that asks the run to stop, the same on all processes, which all ask."""
        return self._signals.reason()

    def advance(self, pause: int) -> None:
        """Train to step `pause`, the end of the run, or a reason to stop.

        The host runs one step ahead of the metrics: it dispatches a step, then waits for the step before it.
        """
        unread = None
        with self._clock:
            while self.step < min(pause, self.blueprint.total_steps) and not self.stopped:
                measured = self._take_step()
                if unread is not None:
                    self.journal.step_done(*unread)
                unread = (self.step, *measured) if measured else None
                self.stopped = self.stopped or self.signal() or self.trouble()
            if unread is not None:
                self.journal.step_done(*unread)
            self.stopped = self.stopped or self.signal() or self.trouble()
        self.journal.flush()  # no checkpoint may have steps that the metrics lack
        self.record = dataclasses.replace(
            self.record,
            step=self.step,
            seconds=self._clock.seconds,
            tokens=self.journal.tokens(self.step),
            skipped=self.journal.skipped,
        )

    def _take_step(self) -> tuple[Any, ...]:
        """Dispatch one step and return its metrics; () if the run has to stop before it."""
        self.watch.at("host roots", self.step)
        try:
            self.state = dataclasses.replace(self.state, opt_state=self.service.install(self.state.opt_state))
        except optimizer.ServiceError as error:
            self.stopped = error
            if jax.process_count() > 1:  # the others know nothing of it, and would wait for this process in a save
                raise TrainingStopped(
                    f"{error}; rerun the same command to resume from the latest checkpoint"
                ) from error
            return ()
        self.watch.at("data", self.step)
        begun = time.monotonic()
        if not self._rows_exist():
            return ()
        batch = next(self._batches)
        self.journal.speedometer.waited_for_input(time.monotonic() - begun)
        self.watch.at("step", self.step)
        with jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1):
            self.state, metrics = self.steps["train"](self.state, batch)
        self.service.take(self.state.opt_state)
        self.step += 1
        return (metrics, *self.steps["diagnose"](self.state.opt_state)) if self.journal.due(self.step) else (metrics,)

    def _rows_exist(self) -> bool:
        """Wait until the rows of the next step are made; return False if the run stops instead.

        Process 0 makes rows and looks for all, so that all processes wait, and end, together.
        """
        while self._made <= self.step and not self.stopped:
            self._made, failure = agreement.first(lambda: self.blueprint.feed.made(self.step))
            if self._made <= self.step:
                self.stopped = UserError(failure) if failure else self.signal()
                time.sleep(_LOOKING_SECONDS)
        return not self.stopped

    def evaluated(self, values: Mapping[str, float]) -> None:
        """Record and report the held-out metrics of this step."""
        self.record = self.record.with_evaluation(dict(values), self.blueprint.ranking)
        self.journal.evaluated(self.step, values, best=self.record.best == self.record.last)
        self.saver.evaluated(self.record)

    def trouble(self) -> str | None:
        """Return why the guard ends the run, or None."""
        limit, skips = self.blueprint.request.config.guard.max_consecutive_skips, self.journal.most_consecutive_skips
        if skips < limit:
            return None
        return (
            f"{skips} consecutive steps were skipped for a non-finite loss, gradient or update "
            f"(config.guard.max_consecutive_skips={limit}). In a new workdir, with resume_from this one, lower "
            "schedule.learning_rate or set gradient_clip"
        )


@contextlib.contextmanager
def storage_faults(on_error: str) -> Iterator[None]:
    """Handle a checkpoint that cannot be saved: "stop" raises TrainingStopped, "continue" warns."""
    try:
        yield
    except SaveError as error:
        if on_error == "stop":
            raise TrainingStopped(f"{error}. Fix the storage, then rerun the same command to resume.") from error
        console.say(f"warning: {error}. Training continues.")
