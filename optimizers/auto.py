"""The refresh schedule chosen by measurement: a solve of each kind on a device and on the host, against a step.

On the devices, refreshing all of a device's blocks once in K steps adds (seconds of all / K) to each step. On the host
it adds nothing to a step of an accelerator as long as the pool keeps up, which asks for an interval of (seconds of all
/ threads / 80 % of a step); where the devices are the host's own cores, what the threads take is taken from them. Of
the intervals that fit the budget the one counts under which roots are youngest, (K - 1) / 2 + delay steps on average.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .host.workers import available_cores, pool_size
from .linalg import sketch
from .options import ShampooOptions
from .plan.blocks import Bucket, Group
from .preconditioners import PRECONDITIONERS

# The most of its time that the pool is to be busy: what is left absorbs solves that take longer than others.
BUSY = 0.8
_REPETITIONS = 3
_ENOUGH_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Choice:
    """A refresh schedule.

    Attributes:
      refresh: "staggered" or "host".
      interval, delay: as in the options.
      reason: the measurements and what follows, for people.
    """

    refresh: str
    interval: int
    delay: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds to refresh everything once.

    Attributes:
      device: all blocks of one device, on that device.
      host: all blocks of one process, on one thread.
      longest: the longest solve of one block on one thread.
    """

    device: float
    host: float
    longest: float


def measure(buckets: Sequence[Bucket], options: ShampooOptions) -> Costs:
    """Time one solve of each kind here: a batch as large as is due at the options' interval on the first local device,
    and one matrix on this thread.
    """
    kinds: dict[tuple[int, Group], int] = {}
    for bucket in buckets:
        for side in bucket.sides:
            # What a solve depends on.
            group = dataclasses.replace(bucket.group, shape=(), sides=(), beta2=0.0)
            key = (bucket.shape[side], group)
            kinds[key] = kinds.get(key, 0) + bucket.slots.shape[1]
    device = host = longest = 0.0
    for (length, group), own in kinds.items():
        preconditioner = PRECONDITIONERS[group.preconditioner]
        batch = max(1, math.ceil(own / options.interval))
        stack, sizes = _random_statistics(batch, length), np.full(batch, length)
        if sketch.columns(length, group.rank) < length:
            stack = sketch.of(stack, group.rank)
        solve = jax.jit(
            lambda stack, sizes, group=group, preconditioner=preconditioner: (
                preconditioner.solve(stack, jnp.zeros_like(stack), sizes, group, options).factor
            )
        )
        one = jax.local_devices()[0]
        on_device = jax.device_put((stack, sizes), one)
        # A mesh that is set for training would have its other devices take part.
        with jax.set_mesh(Mesh(np.array([one]), ("one",))):
            device += own / batch * _seconds(lambda: jax.block_until_ready(solve(*on_device)))
        alone = _seconds(lambda: preconditioner.solve_on_host(stack[0].astype(np.float64), length, group, options))
        host += own * len(jax.local_devices()) * alone
        longest = max(longest, alone)
    return Costs(device, host, longest)


def choose(costs: Costs, step_seconds: float, options: ShampooOptions, *, shares_cores: bool) -> Choice:
    """The schedule under which roots are youngest within the budget.

    Args:
      costs: of `measure`.
      step_seconds: of a train step without roots.
      options: its `interval` is the least that is tried, its `overhead` the budget.
      shares_cores: whether devices are this host's cores, so that its threads take their time.
    """
    budget = options.overhead * step_seconds
    threads = pool_size(options.host_workers)
    on_device = max(options.interval, math.ceil(costs.device / budget))
    room = BUSY * step_seconds * threads
    if shares_cores:
        room = min(room, budget * available_cores())
    on_host = max(options.interval, math.ceil(costs.host / room))
    latency = costs.host / threads / on_host + costs.longest
    delay = 1 + math.ceil(latency / step_seconds)
    on_host = max(on_host, delay + 1)
    ages = {"staggered": (on_device - 1) / 2, "host": (on_host - 1) / 2 + delay}
    refresh = min(ages, key=lambda name: ages[name])
    reason = (
        f"a step without roots takes {_text(step_seconds)}; all roots once, {_text(costs.device)} on each device "
        f"({options.solver}) or {_text(costs.host)} of host threads, of which there are {threads}"
        f"{', on the cores that the devices are' if shares_cores else ''}. Within {options.overhead:.0%} of a step: "
        f"staggered at interval {on_device}, roots {ages['staggered']:.1f} steps old on average; or host at interval "
        f"{on_host} with delay {delay}, {ages['host']:.1f} steps old. Chosen: {refresh}"
    )
    if refresh == "staggered":
        return Choice("staggered", on_device, 0, reason)
    return Choice("host", on_host, delay, reason)


def _random_statistics(batch: int, length: int) -> np.ndarray:
    """Of gradients whose entries fall off as one over the row, as no solver finds too easy."""
    random = np.random.default_rng(0)
    g = random.standard_normal((batch, length, 2 * length), np.float32) / np.arange(1, length + 1)[:, None]
    return (g @ g.swapaxes(1, 2)).astype(np.float32)


def _seconds(run: Any) -> float:
    """The median of a few runs, after one that compiles; of fewer where they take long."""
    run()
    taken = []
    while len(taken) < _REPETITIONS and sum(taken) < _ENOUGH_SECONDS:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _text(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
