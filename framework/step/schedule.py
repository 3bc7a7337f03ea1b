"""The learning rate as a function of the step: warm-up, then decay."""

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
    """A learning rate by the number of accepted steps, called like any `optax.Schedule`.

    Attributes:
      rate: count -> learning rate.
      peak: the highest of them.
    """

    rate: optax.Schedule
    peak: float

    def __call__(self, count: jax.typing.ArrayLike) -> Any:
        """The learning rate after so many steps."""
        return self.rate(count)

    def after(self, steps: int) -> "Schedule":
        """What is left after so many steps, counted anew."""
        return Schedule(lambda count: self.rate(count + steps), self.peak)


def make_schedule(
    learning_rate: float, *, warmup_steps: int, total_steps: int, decay: str, final_fraction: float, begin_step: int = 0
) -> Schedule:
    """Linear warm-up over `warmup_steps` to `learning_rate`, then decay to `final_fraction` of it at
    `total_steps`.

    No step is spent on a rate of zero: step 0 has `learning_rate / (warmup_steps + 1)`, and the last step,
    number `total_steps` - 1, is the last before the end of the decay. `rsqrt` falls as sqrt(w / step), w
    being the warm-up (at least 1), and takes no notice of `final_fraction`. From `begin_step` on, all of this goes as
    if the run were the steps from there to its end: a phase of its own.

    Raises:
      UserError: unknown decay, or a warm-up longer than the run, or what is left of it from `begin_step` on.
    """
    if decay not in DECAYS:
        raise UserError(f"schedule.decay {decay!r} is none of {', '.join(DECAYS)}")
    if not 0 <= final_fraction <= 1:
        raise UserError(f"schedule.final_fraction {final_fraction} must lie between 0 and 1")
    if begin_step:
        if begin_step >= total_steps:
            raise UserError(f"schedule.begin of {begin_step} steps must be shorter than the run of {total_steps} steps")
        phase = make_schedule(
            learning_rate,
            warmup_steps=warmup_steps,
            total_steps=total_steps - begin_step,
            decay=decay,
            final_fraction=final_fraction,
        )
        return Schedule(lambda count: phase(jnp.maximum(jnp.asarray(count) - begin_step, 0)), learning_rate)
    if warmup_steps >= total_steps:
        raise UserError(f"schedule.warmup of {warmup_steps} steps must be shorter than the run of {total_steps} steps")
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
