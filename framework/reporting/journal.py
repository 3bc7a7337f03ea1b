"""What a run reports while it goes: each measurement to the console and to the workdir."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax

from ..base.durations import Period
from ..checkpoint.record import Record
from ..distributed import console
from . import progress
from .clock import Clock, seconds_since_process_start
from .metrics import MetricsWriter


class Reporter(Protocol):
    """Something beside the step that has something to report."""

    def metrics(self) -> dict[str, float]:
        """Numbers by name."""
        ...

    def complaint(self) -> str | None:
        """What a person should hear of since this was asked last, if anything."""
        ...


class Journal:
    """Reads the metrics of steps off the devices, and reports those that are due.

    Args:
      writer: to the workdir; None in all processes but the first.
      speedometer: of this process.
      clock: training time.
      reporters: whatever else has numbers to report with the step's, and complaints to make.
      start: what this process begins after.
      tokens_per_step: trained on in one step.
      total_steps: of the whole run.
      period: of reports; the first and last step of a run are always reported.
    """

    def __init__(
        self,
        writer: MetricsWriter | None,
        speedometer: progress.Speedometer,
        clock: Clock,
        reporters: Sequence[Reporter],
        *,
        start: Record,
        tokens_per_step: int,
        total_steps: int,
        period: Period,
    ):
        self._writer = writer
        self._speedometer = speedometer
        self._clock = clock
        self._reporters = reporters
        self._start = start
        self._tokens_per_step = tokens_per_step
        self._total_steps = total_steps
        self._period = period
        self.seconds_to_first_step: float | None = None
        self.skipped = start.skipped
        self.most_consecutive_skips = 0  # of the steps read
        self.first_spike: int | None = None  # the number of the first step since the start whose loss was one

    def tokens(self, step: int) -> int:
        """Tokens trained on up to and including a step."""
        return self._start.tokens + (step - self._start.step) * self._tokens_per_step

    def due(self, step: int) -> bool:
        """Whether a step is reported."""
        return step == 1 or step == self._total_steps or self._period.due(step)

    def step_done(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Wait for a step and report it if that is due. Steps come in order, each once."""
        numbers = {name: value.item() for name, value in jax.device_get(dict(metrics)).items()}
        seconds = self._clock.seconds
        consecutive_skips, spike, bound = (numbers.pop(name) for name in ("consecutive_skips", "spike", "spike_bound"))
        self.skipped = numbers["skipped"]
        self.most_consecutive_skips = max(self.most_consecutive_skips, consecutive_skips)
        if spike:
            self.first_spike = self.first_spike or step
            console.say(progress.spike_line(step, numbers["loss"], bound, skipped=consecutive_skips > 0))
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = seconds_since_process_start()
            console.say(f"first step done {self.seconds_to_first_step:.1f} s after the process started")
            self._speedometer.warmed_up(step, seconds)
        if not self.due(step):
            return
        values = {name if name.startswith("optimizer/") else f"train/{name}": n for name, n in numbers.items()}
        speed = self._speedometer.read(step, seconds)
        remaining = self._speedometer.remaining(step, seconds)
        console.say(progress.progress_line(step, self._total_steps, values, speed, remaining))
        for reporter in self._reporters:
            if complaint := reporter.complaint():
                console.say(complaint)
            values |= reporter.metrics()
        self._write(step, seconds, values | (speed.values() if speed else {}))

    def went_back(self, record: Record, *, limit: int) -> None:
        """The run goes on from an earlier step, whose record this is; what was measured since is dropped."""
        console.say(
            f"back to step {record.step}, with {record.batches_passed_over} batches passed over in all "
            f"(rollback {record.rollbacks} of {limit})"
        )
        self.first_spike = None
        self.skipped, self.most_consecutive_skips = record.skipped, 0
        self._start = record
        self._speedometer.warmed_up(record.step, self._clock.seconds)
        if self._writer:
            self._writer.drop_after(record.step, evaluated=record.evaluated)

    def evaluated(self, step: int, values: Mapping[str, float], *, best: bool) -> None:
        """Report an evaluation after a step."""
        console.say(progress.evaluation_line(step, values, best))
        self._write(step, self._clock.seconds, {f"heldout/{name}": value for name, value in values.items()})

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        """Wait until everything is on disk."""
        if self._writer:
            self._writer.close()

    def _write(self, step: int, seconds: float, values: dict[str, Any]) -> None:
        if self._writer:
            self._writer.write(step=step, seconds=seconds, tokens=self.tokens(step), values=values)
