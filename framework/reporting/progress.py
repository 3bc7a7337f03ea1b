"""Measure the speed of a run, and format its progress as console lines."""

import datetime
from collections.abc import Mapping
from typing import NamedTuple

from jax.sharding import Mesh

from ..sharding import chips


class Speed(NamedTuple):
    """Throughput of all devices together between two points of training time.

    Attributes:
      steps_per_second: steps per second.
      tokens_per_second: tokens per second.
      mfu: the task's FLOP/s over the devices' bfloat16 peak; None if the peak is not known.
    """

    steps_per_second: float
    tokens_per_second: float
    mfu: float | None

    def values(self) -> dict[str, float]:
        """Return the metrics `throughput/NAME`."""
        return {f"throughput/{name}": value for name, value in self._asdict().items() if value is not None}


class Speedometer:
    """Measure speed from one reading to the next, without the first step of a process (its warm-up)."""

    def __init__(self, mesh: Mesh, *, total_steps: int, tokens_per_step: int, flops_per_step: float):
        self._total_steps = total_steps
        self._tokens_per_step = tokens_per_step
        peak = chips.peak_flops(mesh.devices.flat[0].device_kind)
        self._peak_share_per_step = flops_per_step / (peak * mesh.size) if peak else None
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def warmed_up(self, step: int, seconds: float) -> None:
        """Start measuring at `step`, after `seconds` of training time."""
        self._first = self._last = (step, seconds)

    def read(self, step: int, seconds: float) -> Speed | None:
        """Return the speed since the last reading, None if no step has passed."""
        rate = self._rate(self._last, step, seconds)
        if rate is None:
            return None
        self._last = (step, seconds)
        mfu = rate * self._peak_share_per_step if self._peak_share_per_step else None
        return Speed(rate, rate * self._tokens_per_step, mfu)

    def remaining(self, step: int, seconds: float) -> float | None:
        """Return the training seconds left at this process' mean speed, None if no step has passed."""
        rate = self._rate(self._first, step, seconds)
        return (self._total_steps - step) / rate if rate else None

    @staticmethod
    def _rate(since: tuple[int, float] | None, step: int, seconds: float) -> float | None:
        if since is None or step <= since[0] or seconds <= since[1]:
            return None
        return (step - since[0]) / (seconds - since[1])


def progress_line(
    step: int, total_steps: int, values: Mapping[str, float], speed: Speed | None, remaining: float | None
) -> str:
    """Return `step 120/600  loss 5.4321  learning rate 3.00e-03  12.3 steps/s  25.2k tokens/s  ETA 0:00:39`."""
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    parts.append(f"loss {values['train/loss']:.4f}")
    parts.append(f"learning rate {values['train/learning_rate']:.2e}")
    parts += [f"{name} {values[f'train/{name}']}" for name in ("skipped", "spikes") if values[f"train/{name}"]]
    if speed:
        parts += [f"{speed.steps_per_second:.3g} steps/s", f"{_short(speed.tokens_per_second)} tokens/s"]
        if speed.mfu is not None:
            parts.append(f"MFU {speed.mfu:.1%}")
    if remaining:
        parts.append(f"ETA {datetime.timedelta(seconds=round(remaining))}")
    return "  ".join(parts)


def evaluation_line(step: int, values: Mapping[str, float], best: bool) -> str:
    """Return `held-out after step 120: loss 5.1000, accuracy 0.2000 (best so far)`."""
    loss_first = sorted(values, key=lambda name: name != "loss")
    shown = ", ".join(f"{name} {values[name]:.4f}" for name in loss_first)
    return f"held-out after step {step}: {shown}{' (best so far)' if best else ''}"


def spike_line(step: int, loss: float, bound: float, *, skipped: bool) -> str:
    """Return `loss spike at step 120: 7.1000, above the bound of 5.6000; the step is skipped`."""
    verdict = "is skipped" if skipped else "is not skipped"
    return f"loss spike at step {step}: {loss:.4f}, above the bound of {bound:.4f}; the step {verdict}"


def _short(number: float) -> str:
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.3g}"
