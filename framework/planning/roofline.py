"""FLOPs, traffic and least time of a step, from the program of one device. A bound, no measurement.

An operation takes the longer of its FLOPs at the peak of the matrix units and its bytes at the bandwidth of the memory
(Williams et al., "Roofline", 2009); what is fused into it is read with it and costs nothing more. A collective takes
the bytes that a device must send, over all of its links. Nothing overlaps and nothing waits.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from ..sharding.chips import Speeds
from .collectives import Collective
from .device_program import COLLECTIVES, Body, Operation, Value
from .liveness import Fusion

_SLICES = ("slice", "dynamic_slice", "all_slice", "gather")


@dataclasses.dataclass
class Work:
    """What one device does in a step.

    Attributes:
      flops: of all products, those of recomputation and of the optimizer included.
      memory_bytes: read and written.
      traffic: kind of collective -> (how often it runs, bytes of all results).
      seconds: of products and memory, at the public figures of the device; None where there are none.
      network_seconds: of the collectives.
    """

    flops: float = 0.0
    memory_bytes: float = 0.0
    traffic: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    seconds: float | None = 0.0
    network_seconds: float | None = 0.0

    @property
    def step_seconds(self) -> float | None:
        """All of it, one after the other."""
        return None if self.seconds is None or self.network_seconds is None else self.seconds + self.network_seconds


def work(body: Body, speeds: Speeds | None, while_turns: float) -> Work:
    """Of a whole step.

    Args:
      body: the step.
      speeds: of the device.
      while_turns: how often a loop of unknown length is assumed to run; a loop around such loops runs once.
    """
    total = Work() if speeds else Work(seconds=None, network_seconds=None)
    _add(total, body, {}, 1.0, _Assumed(speeds, while_turns))
    return total


class _Assumed(NamedTuple):
    speeds: Speeds | None
    while_turns: float


def _add(total: Work, body: Body, outer: Mapping[Value, frozenset[Value]], times: float, assumed: _Assumed) -> None:
    fusion = Fusion(body, outer)
    reads: dict[Value, dict[Value, int]] = {}
    for operation in body.operations:
        written = [x for x in operation.results if fusion.sources[x] == {x}]
        read = _reads(operation, reads)
        for value in operation.results:
            reads[value] = {value: value.bytes} if value in written else read
        if operation.bodies:
            turns = times * _turns(operation, assumed.while_turns)
            _add(total, _longest(operation), fusion.sources, turns, assumed)
        elif written:
            _count(total, operation, sum(read.values()) + sum(x.bytes for x in written), times, assumed.speeds)


def _count(total: Work, operation: Operation, size: float, times: float, speeds: Speeds | None) -> None:
    total.flops += times * operation.flops
    if operation.kind in ("dynamic_update_slice", "scatter"):
        size = 2 * operation.operands[-1 if operation.kind == "scatter" else 1].bytes
    total.memory_bytes += times * size
    if speeds and total.seconds is not None:
        total.seconds += times * max(operation.flops * operation.passes / speeds.flops, size / speeds.memory)
    if operation.kind in COLLECTIVES:
        for value in operation.results:
            count, result = total.traffic.get(operation.kind, (0.0, 0.0))
            total.traffic[operation.kind] = (count + times, result + times * value.bytes)
            if speeds and total.network_seconds is not None:
                sent = Collective(operation.kind, value.bytes, operation.group).sent
                total.network_seconds += times * sent / speeds.network


def _reads(operation: Operation, reads: Mapping[Value, Mapping[Value, int]]) -> dict[Value, int]:
    """Written value -> bytes of it that an operation reads, of a slice no more than the slice."""
    found: dict[Value, int] = {}
    values = operation.operands[:1] if operation.kind in _SLICES else operation.operands
    for value in values:
        for source, size in reads.get(value, {value: value.bytes}).items():
            found[source] = max(size, found.get(source, 0))
    if operation.kind in _SLICES:
        found = {source: min(size, operation.results[0].bytes) for source, size in found.items()}
    return found


def _longest(operation: Operation) -> Body:
    """The body of a loop, or the branch of a condition with most products."""
    return max(operation.bodies, key=_products)


def _products(body: Body) -> float:
    return sum(each.flops + max(map(_products, each.bodies), default=0.0) for each in body.operations)


def _turns(operation: Operation, while_turns: float) -> float:
    if operation.kind != "while":
        return 1.0
    if operation.turns is not None:
        return operation.turns
    return 1.0 if any(map(_has_unknown, operation.bodies)) else while_turns


def _has_unknown(body: Body) -> bool:
    return any(
        (operation.kind == "while" and operation.turns is None) or any(map(_has_unknown, operation.bodies))
        for operation in body.operations
    )
