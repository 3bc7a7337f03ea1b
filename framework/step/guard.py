"""The guard of the train step: refuse steps with non-finite numbers, detect loss spikes, count both.

A spike is a finite loss far above the recent losses. The config decides whether its step is refused. All decisions are
scalars computed inside the step from global arrays, so that all devices decide alike.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...optimizers.linalg.scaling import all_finite

# Minimum deviation, as a fraction of the mean, so that rounding noise of a constant loss is not a spike.
_LEAST_DEVIATION = 1e-3


@dataclasses.dataclass(frozen=True)
class GuardOptions:
    """The knobs of `config.guard` that define loss spikes and what the step does with them."""

    on_spike: str
    spike_factor: float
    spike_window: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """State of the guard: scalars, int32 counts and float32 statistics.

    Attributes:
      accepted: number of steps not skipped.
      skipped: number of steps skipped.
      consecutive: number of skipped steps since the last accepted step.
      clipped: number of accepted steps whose gradient was clipped.
      spikes: number of loss spikes, skipped or not.
      loss_mean: exponential moving average of the accepted losses, decay 1 - 1/window.
      loss_deviation: the same average of the distance of each accepted loss from the mean before it.
    """

    accepted: Any
    skipped: Any
    consecutive: Any
    clipped: Any
    spikes: Any
    loss_mean: Any
    loss_deviation: Any


class Verdict(NamedTuple):
    """Decision on one step: `accepted` and `spike`, bool scalars, and the largest loss that is no spike."""

    accepted: jax.Array
    spike: jax.Array
    bound: jax.Array


def initial() -> Guard:
    """Return the state before the first step."""
    zero, nothing = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    return Guard(zero, zero, zero, zero, zero, loss_mean=nothing, loss_deviation=nothing)


def judge(guard: Guard, loss: jax.Array, gradients_finite: jax.Array, options: GuardOptions) -> Verdict:
    """Decide on a step before its update. Only a step with finite loss and gradient can be a spike."""
    deviation = jnp.maximum(guard.loss_deviation, _LEAST_DEVIATION * jnp.abs(guard.loss_mean))
    warm = guard.accepted >= options.spike_window
    bound = jnp.where(warm, guard.loss_mean + options.spike_factor * deviation, jnp.inf)
    finite = gradients_finite & jnp.isfinite(loss)
    spike = finite & (loss > bound)
    return Verdict(finite if options.on_spike == "ignore" else finite & ~spike, spike, bound)


def applied(update_norm: jax.Array, new: Any, old: Any) -> jax.Array:
    """Return whether a step can still be accepted after its update: a bool scalar.

    An optimizer that refuses updates itself, such as Distributed Shampoo, counts them in a field `skipped` of its
    state. In other states no number may become infinite or NaN, for example the square of a large finite gradient.

    Args:
      update_norm: global norm of the update.
      new: optimizer and model state after the step.
      old: the same before it.
    """

    def counts(node: Any) -> bool:
        return hasattr(node, "skipped")

    fine, arrays = jnp.isfinite(update_norm), []
    for before, after in zip(*(jax.tree.leaves(tree, is_leaf=counts) for tree in (old, new)), strict=True):
        if counts(before):
            fine &= before.skipped == after.skipped
        elif jnp.issubdtype(after.dtype, jnp.floating):
            arrays.append(jnp.where(jnp.isfinite(before), after, 0))
    return fine & all_finite(arrays)


def updated(guard: Guard, verdict: Verdict, loss: jax.Array, clipped: jax.Array | bool, options: GuardOptions) -> Guard:
    """Return the state after a step whose gradient was `clipped` or not. A refused step leaves the statistics."""
    accepted = verdict.accepted
    change = loss.astype(jnp.float32) - guard.loss_mean
    surprise = jnp.abs(change) - guard.loss_deviation
    mean = guard.loss_mean + _weight(guard.accepted + 1, options) * change
    # The first loss has no mean before it: there is one deviation less than losses.
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
    """Return the weight of the newest of `count` values: (1 - decay) / (1 - decay^count), with decay 1 - 1/window."""
    window = options.spike_window
    return 1 / window / -jnp.expm1(jnp.maximum(count, 1) * math.log1p(-1 / window))
