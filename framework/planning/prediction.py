"""What a step takes, without compiling it: memory, work, time, and the cores that solve roots beside it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...optimizers.linalg import lapack
from ...optimizers.linalg.sketch import columns
from ..sharding import chips
from . import device_program, liveness, roofline

BUSY = 0.8  # the share of their time that host cores are planned to solve


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of each device and each step, unless said otherwise.

    Attributes:
      peak: bytes, of the state, the batch and all that a step makes of them.
      flops: of all products, those of recomputation and of the optimizer included.
      memory_bytes: read and written.
      traffic: kind of collective -> (how often it runs, bytes of its results), loops at every turn.
      compute_seconds: of products and memory traffic, at public figures; None where there are none for the device.
      network_seconds: of collectives, likewise.
      step_seconds: of both together; a bound, no measurement.
      utilisation: model FLOPs per second as a share of the device's peak (MFU).
    """

    peak: int
    flops: float
    memory_bytes: float
    traffic: Mapping[str, tuple[float, float]]
    compute_seconds: float | None
    network_seconds: float | None
    step_seconds: float | None
    utilisation: float | None


def predict(step: Any, state: Any, batch: Any, *, kept: int, model_flops: float, kind: str, turns: float) -> Prediction:
    """Predict one step.

    Args:
      step: the jitted train step.
      state: its first argument, ShapeDtypeStructs with shardings.
      batch: its second.
      kept: bytes of both on a device.
      model_flops: of a step on each device, as the task counts them.
      kind: of the device, one that `chips` knows or not.
      turns: how often the body of a loop of unknown length is assumed to run.
    """
    # For a TPU whatever is here: other platforms have other random numbers and solvers.
    body = device_program.read(step.trace(state, batch).lower(lowering_platforms=("tpu",)))
    speeds = chips.speeds(kind)
    work = roofline.work(body, speeds, turns)
    seconds = work.step_seconds
    return Prediction(
        peak=kept + liveness.peak(body),
        flops=work.flops,
        memory_bytes=work.memory_bytes,
        traffic=work.traffic,
        compute_seconds=work.seconds,
        network_seconds=work.network_seconds,
        step_seconds=seconds,
        utilisation=model_flops / seconds / speeds.flops if speeds and seconds else None,
    )


def host_seconds(buckets: Any) -> float:
    """Of one core to solve all roots of a plan's buckets once, over all hosts together."""
    return sum(
        bucket.blocks * sum(lapack.seconds(columns(bucket.shape[side], bucket.group.rank)) for side in bucket.sides)
        for bucket in buckets
    )


def host_cores(seconds: float, interval: int, step_seconds: float) -> float:
    """Cores that solve all roots once in `interval` steps and are idle for a fifth of the time, over all hosts."""
    return seconds / interval / step_seconds / BUSY
