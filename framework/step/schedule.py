"""The learning rate as a function of the step: linear warm-up, then decay."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..base.errors import UserError

DECAYS = ("cosine", "linear", "quadratic", "constant", "rsqrt")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the number of accepted steps, an `optax.Schedule` with a peak.

    Attributes:
      rate: count -> learning rate.
      peak: highest learning rate.
    """

    rate: optax.Schedule
    peak: float

    def __call__(self, count: jax.typing.ArrayLike) -> Any:
        """Return the learning rate after `count` steps."""
        return self.rate(count)

    def after(self, steps: int) -> "Schedule":
        """Return the schedule shifted by `steps`: its count 0 is count `steps` of this one."""
        return Schedule(lambda count: self.rate(count + steps), self.peak)


def make_schedule(
    learning_rate: float, *, warmup_steps: int, total_steps: int, decay: str, final_fraction: float, begin_step: int = 0
) -> Schedule:
    """Return a linear warm-up to `learning_rate`, then a decay to `final_fraction` of it at `total_steps`.

    No step has a rate of zero: step 0 has `learning_rate / (warmup_steps + 1)`, and step `total_steps` - 1 is the last
    before the end of the decay. `rsqrt` decays as sqrt(w / step), where w is the warm-up (at least 1), and ignores
    `final_fraction`. With `begin_step`, warm-up and decay cover the steps from there to the end: a second phase.

    Raises:
      UserError: the decay is unknown, or the warm-up is longer than the run or its second phase.
    """
    if decay not in DECAYS:
        raise UserError(f"config.schedule.decay={decay!r}: must be one of {', '.join(DECAYS)}.")
    if not 0 <= final_fraction <= 1:
        raise UserError(f"config.schedule.final_fraction={final_fraction}: must be between 0 and 1.")
    if begin_step:
        if begin_step >= total_steps:
            raise UserError(
                f"config.schedule.begin={begin_step} steps: must be shorter than the run of {total_steps} steps."
            )
        phase = make_schedule(
            learning_rate,
            warmup_steps=warmup_steps,
            total_steps=total_steps - begin_step,
            decay=decay,
            final_fraction=final_fraction,
        )
        return Schedule(lambda count: phase(jnp.maximum(jnp.asarray(count) - begin_step, 0)), learning_rate)
    if warmup_steps >= total_steps:
        raise UserError(
            f"config.schedule.warmup={warmup_steps} steps: must be shorter than the run of {total_steps} steps."
        )
    decay_steps = total_steps - warmup_steps
    after: optax.Schedule
    if decay == "cosine":
        after = optax.cosine_decay_schedule(learning_rate, decay_steps, alpha=final_fraction)
    elif decay == "linear":
        after = optax.linear_schedule(learning_rate, learning_rate * final_fraction, decay_steps)
    elif decay == "quadratic":
        after = optax.polynomial_schedule(learning_rate, learning_rate * final_fraction, 2, decay_steps)
    elif decay == "constant":
        after = optax.constant_schedule(learning_rate)
    else:
        start = max(warmup_steps, 1)
        after = functools.partial(_rsqrt, learning_rate, start)
    if warmup_steps == 0:
        return Schedule(after, learning_rate)
    before = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    return Schedule(optax.join_schedules([before, after], [warmup_steps]), learning_rate)


def _rsqrt(learning_rate: float, start: int, count: jax.typing.ArrayLike) -> jax.Array:
    return learning_rate * jax.lax.rsqrt(1.0 + count / start)
