"""The refresh schedule: which phases of the refresh interval are due on which step."""

import jax
import jax.numpy as jnp

from ..options import Options


def due_phases(step: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    """(first, count): the phases first, first + 1, ... first + count - 1, modulo the interval, are due on this step.

    On a step whose interval is k, interval / k phases are due, so that every block is refreshed once in k steps. With
    early intervals the phases go on from where the shorter interval left them. Nothing is due so early that the roots
    would be replaced before `start_step`.

    Args:
      step: int32, number of the step, from 1.
      options: interval, early_intervals, start_step.
    """
    first, count, before = jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32), 0
    for last, interval in reversed(options.early_intervals):
        count = jnp.where(step <= last, options.interval // interval, count)
    for last, interval in options.early_intervals:
        first += jnp.clip(step - 1 - before, 0, last - before) * (options.interval // interval)
        before = last
    first += jnp.maximum(step - 1 - before, 0)
    count = jnp.where(step >= _first_due(options), count, 0)
    return first % options.interval, count


def phases_due(step: int, options: Options) -> int:
    """The count of `due_phases`, on the host."""
    interval = next((interval for last, interval in options.early_intervals if step <= last), options.interval)
    return options.interval // interval if step >= _first_due(options) else 0


def _first_due(options: Options) -> int:
    return options.start_step - options.interval - (options.delay if options.refresh == "host" else 0)
