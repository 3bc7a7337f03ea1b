"""Measure time and speed of a run, and format its progress as a console line."""

import datetime
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from jax.sharding import Mesh

from ..sharding import chips
from .status import short

_IMPORTED = time.monotonic()
_SHOWN_WAIT = 0.05  # of the time; laying a batch over the devices takes less


class Clock:
    """A stopwatch that runs while entered: during training, but not during compilation, evaluation or saving."""

    def __init__(self, seconds: float):
        """Start from the `seconds` of earlier processes of the run."""
        self._before = seconds
        self._started: float | None = None

    def __enter__(self):
        self._started = time.monotonic()
        return self

    def __exit__(self, *exception):
        self._before, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        """Training seconds so far."""
        return self._before + (time.monotonic() - self._started if self._started is not None else 0.0)


def seconds_since_process_start() -> float:
    """Return the age of this process, or the time since this module was imported where the system does not tell."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.monotonic() - _IMPORTED
    # Field 22, in clock ticks since boot. The name in field 2 may hold spaces but ends with the last bracket.
    started = int(stat.read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


class Speedometer:
    """Measure the speed of all devices together, without the first step of a process (its warm-up).

    Args:
      mesh: the devices.
      total_steps: steps of the whole run.
      examples_per_step: examples of a global batch.
      tokens_per_step: tokens of a global batch; equal to `examples_per_step` where examples are not text.
      flops_per_step: FLOPs of a step by the task's formula; MFU is their rate over the devices' bfloat16 peak.
    """

    def __init__(
        self, mesh: Mesh, *, total_steps: int, examples_per_step: int, tokens_per_step: int, flops_per_step: float
    ):
        self._total_steps = total_steps
        self._per_step: dict[str, float] = {"steps_per_second": 1, "examples_per_second": examples_per_step}
        if tokens_per_step != examples_per_step:
            self._per_step["tokens_per_second"] = tokens_per_step
        if peak := chips.peak_flops(mesh.devices.flat[0].device_kind):
            self._per_step["mfu"] = flops_per_step / (peak * mesh.size)
        self._first = self._last = (0, math.inf)
        self._waited = 0.0
        self._real: list[float] = []

    def warmed_up(self, step: int, seconds: float) -> None:
        """Start measuring at `step`, after `seconds` of training time."""
        self._first, self._last, self._waited = (step, seconds), (step, seconds), 0.0
        self._real.clear()

    def step_done(self, real: float) -> None:
        """Count a step in which this share of the tokens was no padding. Padding is neither speed nor useful work."""
        self._real.append(real)

    def waited_for_input(self, seconds: float) -> None:
        """Add the seconds that training waited for a batch."""
        self._waited += seconds

    def read(self, step: int, seconds: float) -> dict[str, float]:
        """Return the metrics `throughput/...` since the last reading, {} if no step has passed.

        `input_wait` is the share of the time that training waited for batches.
        """
        rate = self._rate(self._last, step, seconds)
        if not rate:
            return {}
        real = sum(self._real) / len(self._real) if self._real else 1.0
        shares = {"tokens_per_second": real, "mfu": real}
        values = {name: rate * count * shares.get(name, 1.0) for name, count in self._per_step.items()}
        values["input_wait"] = self._waited / (seconds - self._last[1])
        self._last, self._waited = (step, seconds), 0.0
        self._real.clear()
        return {f"throughput/{name}": value for name, value in values.items()}

    def remaining(self, step: int, seconds: float) -> float | None:
        """Return the training seconds left at this process' mean speed, None if no step has passed."""
        rate = self._rate(self._first, step, seconds)
        return (self._total_steps - step) / rate if rate else None

    @staticmethod
    def _rate(since: tuple[int, float], step: int, seconds: float) -> float:
        return (step - since[0]) / (seconds - since[1]) if step > since[0] and seconds > since[1] else 0.0


def progress_line(step: int, total_steps: int, values: Mapping[str, float], remaining: float | None) -> str:
    """Return `step 120/600  loss 5.4321  learning rate 3.00e-03  12.3 steps/s  25.2k tokens/s  ETA 0:00:39`."""
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    parts.append(f"loss {values['train/loss']:.4f}")
    parts.append(f"learning rate {values['train/learning_rate']:.2e}")
    parts += [f"skipped {values['train/skipped']}"] if values["train/skipped"] else []
    speed = {name.removeprefix("throughput/"): each for name, each in values.items() if name.startswith("throughput/")}
    if speed:
        unit = "tokens" if "tokens_per_second" in speed else "examples"
        parts += [f"{speed['steps_per_second']:.3g} steps/s", f"{short(speed[f'{unit}_per_second'])} {unit}/s"]
    if "mfu" in speed:
        parts.append(f"MFU {speed['mfu']:.1%}")
    if speed.get("input_wait", 0) >= _SHOWN_WAIT:
        parts.append(f"waits for input {speed['input_wait']:.0%}")
    if remaining:
        parts.append(f"ETA {datetime.timedelta(seconds=round(remaining))}")
    return "  ".join(parts)
