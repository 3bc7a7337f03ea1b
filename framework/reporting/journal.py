"""Report the measurements of a run to the console and to the workdir."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from ..base.durations import Period
from ..checkpoint.record import Record
from ..distributed import console
from ..step.scalars import Scalars
from .metrics import MetricsWriter
from .progress import Clock, Speedometer, progress_line, seconds_since_process_start


class Reporter(Protocol):
    """A part of the run, such as the saver, that has its own metrics and warnings."""

    def metrics(self) -> dict[str, float]:
        """Return metrics by name."""
        ...

    def complaint(self) -> str | None:
        """Return a warning about the time since the last call, or None."""
        ...


_LAYERS_WRITTEN = 200  # at most, over a run: a table of all layers is longer than a line of metrics


@dataclasses.dataclass
class Journal:
    """Read the metrics of each step from the devices, record them, and report those that are due.

    Attributes:
      writer: writer of metrics, None on all processes but the first.
      clock: training time.
      reporters: parts of the run whose metrics and warnings are reported with those of a step.
      start: record that this process starts from.
      period: how often to report; the first and last step are always reported.
      by_layer: makes names of layers, and metric -> [layers], of arrays about the optimizer's blocks.
      seconds_to_first_step: time from process start to the end of the first step.
      skipped: number of skipped steps in the whole run.
      most_consecutive_skips: largest number of consecutive skipped steps since the start.
    """

    writer: MetricsWriter | None
    speedometer: Speedometer
    clock: Clock
    reporters: Sequence[Reporter]
    _: dataclasses.KW_ONLY
    start: Record
    tokens_per_step: int
    total_steps: int
    period: Period
    by_layer: Callable[[Mapping[str, Any]], tuple[Sequence[str], Mapping[str, Any]]]
    seconds_to_first_step: float | None = None
    skipped: int = dataclasses.field(init=False)
    most_consecutive_skips: int = 0

    def __post_init__(self):
        self.skipped = self.start.skipped

    def tokens(self, step: int) -> int:
        """Return the tokens trained on up to and including a step."""
        return self.start.tokens + (step - self.start.step) * self.tokens_per_step

    def due(self, step: int) -> bool:
        """Return whether a step is reported."""
        return step == 1 or step == self.total_steps or self.period.due(step)

    def step_done(
        self, step: int, metrics: Scalars, diagnostics: Mapping[str, Any] | None = None, layers: Any = None
    ) -> None:
        """Wait for a step, record it, and report it if due. Call it once per step, in order.

        Args:
          step: its number.
          metrics: of the step.
          diagnostics: of the optimizer, for reported steps.
          layers: arrays about the optimizer's blocks, for `by_layer`.
        """
        if layers and self.writer and self._layers_due(step):
            self.writer.layers(step, *self.by_layer(jax.device_get(layers)))
        both = (metrics, diagnostics or {})
        numbers = {name: _number(value) for each in both for name, value in each.items()}
        seconds = self.clock.seconds
        consecutive_skips = int(numbers.pop("consecutive_skips"))
        self.skipped = int(numbers["skipped"])
        self.most_consecutive_skips = max(self.most_consecutive_skips, consecutive_skips)
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = seconds_since_process_start()
            console.say(f"first step done {self.seconds_to_first_step:.1f} s after the process started")
            self.speedometer.warmed_up(step, seconds)
        else:
            self.speedometer.step_done(numbers.get("real_tokens", 1.0))
        values = {name if name.startswith("optimizer/") else f"train/{name}": n for name, n in numbers.items()}
        if not self.due(step):
            self._write(step, seconds, values)
            return
        values |= self.speedometer.read(step, seconds)
        remaining = self.speedometer.remaining(step, seconds)
        console.say(progress_line(step, self.total_steps, values, remaining))
        for reporter in self.reporters:
            if complaint := reporter.complaint():
                console.say(complaint)
            values |= reporter.metrics()
        self._write(step, seconds, values, reported=True)

    def evaluated(self, step: int, values: Mapping[str, float], *, best: bool) -> None:
        """Report the held-out metrics after a step."""
        names = sorted(values, key=lambda name: (name != "loss", name))
        shown = ", ".join(f"{name} {values[name]:.4f}" for name in names)
        console.say(f"held-out after step {step}: {shown}{' (best so far)' if best else ''}")
        named = {f"heldout/{name}": value for name, value in values.items()}
        self._write(step, self.clock.seconds, named, reported=True)

    def sampled(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Report the continuations of prompts after a step: objects with "prompt" and "text"."""
        for each in samples:
            console.say(f"sample after step {step}: {each['prompt']} ... {' '.join(each['text'].split())}")
        if self.writer:
            self.writer.samples(step=step, samples=samples)

    def flush(self) -> None:
        """Write the steps that have only been recorded."""
        if self.writer:
            self.writer.flush()

    def settle(self) -> None:
        """Wait until what was recorded is where a resumed run finds it."""
        if self.writer:
            self.writer.settle()

    def close(self, *, complete: bool) -> None:
        """Write everything, and let the trackers finish."""
        if self.writer:
            self.writer.close(complete=complete)

    def _layers_due(self, step: int) -> bool:
        every = math.ceil(self.total_steps / _LAYERS_WRITTEN / max(1, self.period.steps)) * self.period.steps
        return step in (1, self.total_steps) or Period(every).due(step)

    def _write(self, step: int, seconds: float, values: dict[str, Any], *, reported: bool = False) -> None:
        if self.writer:
            tokens = self.tokens(step)
            self.writer.write(step=step, seconds=seconds, tokens=tokens, values=values, reported=reported)


def _number(value: np.generic) -> float:
    """Return a number for Python; of a float32 the shortest that rounds to it."""
    return float(str(value)) if isinstance(value, np.floating) else value.item()
