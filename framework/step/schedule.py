"""The learning rate as a function of the step: linear warm-up, then decay."""

import jax
import jax.numpy as jnp
import optax

from ..base.errors import UserError

# name -> (rate after the warm-up, as a function of peak, steps, final fraction and warm-up steps)
_AFTER = {
    "cosine": lambda peak, steps, final, warmup: optax.cosine_decay_schedule(peak, steps, alpha=final),
    "linear": lambda peak, steps, final, warmup: optax.linear_schedule(peak, peak * final, steps),
    "quadratic": lambda peak, steps, final, warmup: optax.polynomial_schedule(peak, peak * final, 2, steps),
    "constant": lambda peak, steps, final, warmup: optax.constant_schedule(peak),
    "rsqrt": lambda peak, steps, final, warmup: lambda count: peak * jax.lax.rsqrt(1.0 + count / max(warmup, 1)),
}


def make_schedule(
    learning_rate: float, *, warmup_steps: int, total_steps: int, decay: str, final_fraction: float, begin_step: int = 0
) -> optax.Schedule:
    """Return a linear warm-up to `learning_rate`, then a decay to `final_fraction` of it at `total_steps`.

    It is a function of the number of accepted steps. No step has a rate of zero: step 0 has
    `learning_rate / (warmup_steps + 1)`, and step `total_steps` - 1 is the last before the end of the decay. `rsqrt`
    decays as sqrt(w / step), where w is the warm-up (at least 1), and ignores `final_fraction`. With `begin_step`,
    warm-up and decay cover the steps from there to the end: a second phase.

    Raises:
      UserError: the decay is unknown, or the warm-up is longer than the run or its second phase.
    """
    if decay not in _AFTER:
        raise UserError(f"config.schedule.decay={decay!r}: must be one of {', '.join(_AFTER)}.")
    if not 0 <= final_fraction <= 1:
        raise UserError(f"config.schedule.final_fraction={final_fraction}: must be between 0 and 1.")
    for name, first, steps in (("begin", begin_step, total_steps), ("warmup", warmup_steps, total_steps - begin_step)):
        if first and first >= steps:
            raise UserError(f"config.schedule.{name}={first} steps: must be shorter than the run of {steps} steps.")
    rate = _AFTER[decay](learning_rate, total_steps - begin_step - warmup_steps, final_fraction, warmup_steps)
    if warmup_steps:
        warmup = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
        rate = optax.join_schedules([warmup, rate], [warmup_steps])
    return lambda count: rate(jnp.maximum(jnp.asarray(count) - begin_step, 0))
