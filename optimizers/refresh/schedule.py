"""The refresh schedule: phases of the refresh interval that are due on a step."""

import jax
import jax.numpy as jnp

from ..options import Options


def due_phases(step: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    """Return (first, count): the phases first, ..., first + count - 1, modulo the interval, are due on this step.

    While the interval is k, interval / k phases are due per step, so that every block is refreshed every k steps. When
    the interval changes, phases continue in order. A refresh is omitted if another follows before `start_step`.

    Args:
      step: int32, number of the step, from 1.
      options: options of the optimizer.
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
    """Return the count of `due_phases`, on the host."""
    interval = next((interval for last, interval in options.early_intervals if step <= last), options.interval)
    return options.interval // interval if step >= _first_due(options) else 0


def _first_due(options: Options) -> int:
    return options.start_step - options.interval - (options.delay if options.refresh == "host" else 0)
