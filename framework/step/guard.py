"""The guard of the train step: which steps are refused, which losses are spikes, and how often either happened.

A step whose loss or gradient is not finite is refused. A finite loss that lies far above those of late is a spike; by
config its step is trained on or refused. Everything here is a scalar computed in the step, the same on all devices, so
that all of them decide alike.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Of the mean: the least that a deviation counts for, lest the rounding of a constant loss be a spike.
_LEAST_DEVIATION = 1e-3


@dataclasses.dataclass(frozen=True)
class GuardOptions:
    """What is a spike, and what becomes of its step.

    Attributes:
      on_spike: "ignore" trains on it, "skip" refuses the step; so does "rollback", after which the host goes back to a
        checkpoint.
      spike_factor: a spike is a loss so many deviations above the mean of the accepted ones.
      spike_window: accepted steps that the mean and the deviation look back on, and that come before the first spike.
    """

    on_spike: str
    spike_factor: float
    spike_window: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """What the guard remembers from step to step: scalars, the counts int32, the statistics float32.

    Attributes:
      accepted: steps that were not skipped.
      skipped: steps that were.
      consecutive: how many of the last steps were skipped in a row.
      clipped: accepted steps whose gradient was clipped.
      spikes: steps whose loss was a spike, skipped or not.
      loss_mean: of the accepted losses, each step's weighing 1 - 1/window of the next one's.
      loss_deviation: mean absolute deviation of the accepted losses, each from the mean before it, weighed likewise.
    """

    accepted: Any
    skipped: Any
    consecutive: Any
    clipped: Any
    spikes: Any
    loss_mean: Any
    loss_deviation: Any


class Verdict(NamedTuple):
    """On one step: whether it is accepted, whether its loss is a spike (bool scalars), and the bound on the loss."""

    accepted: jax.Array
    spike: jax.Array
    bound: jax.Array


def initial() -> Guard:
    """Before the first step."""
    zero, nothing = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    return Guard(zero, zero, zero, zero, zero, loss_mean=nothing, loss_deviation=nothing)


def judge(guard: Guard, loss: jax.Array, gradients_finite: jax.Array, options: GuardOptions) -> Verdict:
    """Decide on a step. Only a step that is finite throughout can be a spike.

    Args:
      guard: as the step before has left it.
      loss: scalar.
      gradients_finite: bool scalar, of all elements.
      options: static.
    """
    deviation = jnp.maximum(guard.loss_deviation, _LEAST_DEVIATION * jnp.abs(guard.loss_mean))
    warm = guard.accepted >= options.spike_window
    bound = jnp.where(warm, guard.loss_mean + options.spike_factor * deviation, jnp.inf)
    finite = gradients_finite & jnp.isfinite(loss)
    spike = finite & (loss > bound)
    return Verdict(finite if options.on_spike == "ignore" else finite & ~spike, spike, bound)


def updated(guard: Guard, verdict: Verdict, loss: jax.Array, clipped: jax.Array | bool, options: GuardOptions) -> Guard:
    """The guard after the step of the verdict; a loss that was not accepted leaves the statistics as they are.

    Args:
      guard: as the step before has left it.
      verdict: of `judge`.
      loss: scalar.
      clipped: bool scalar, whether the gradient was longer than allowed.
      options: static.
    """
    accepted = verdict.accepted
    change = loss.astype(jnp.float32) - guard.loss_mean
    surprise = jnp.abs(change) - guard.loss_deviation
    mean = guard.loss_mean + _weight(guard.accepted + 1, options) * change
    # The first loss has no mean to deviate from, so that there is one deviation less than there are losses.
    deviation = jnp.where(guard.accepted > 0, _weight(guard.accepted, options) * surprise, 0) + guard.loss_deviation
    return Guard(
        accepted=guard.accepted + jnp.where(accepted, 1, 0),
        skipped=guard.skipped + jnp.where(accepted, 0, 1),
        consecutive=jnp.where(accepted, 0, guard.consecutive + 1),
        clipped=guard.clipped + jnp.where(accepted & clipped, 1, 0),
        spikes=guard.spikes + jnp.where(verdict.spike, 1, 0),
        loss_mean=jnp.where(accepted, mean, guard.loss_mean),
        loss_deviation=jnp.where(accepted, deviation, guard.loss_deviation),
    )


def _weight(count: jax.Array, options: GuardOptions) -> jax.Array:
    """Of the newest of `count` values whose weights sum to 1: (1 - decay) / (1 - decay^count), decay 1 - 1/window."""
    window = options.spike_window
    return 1 / window / -jnp.expm1(jnp.maximum(count, 1) * math.log1p(-1 / window))
