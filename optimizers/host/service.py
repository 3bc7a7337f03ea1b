"""Compute roots on the host: threads solve in float64 by LAPACK while the devices take the next steps.

Around each step, outside jit:

    state = service.install(state)      install the roots of the statistics of `delay` steps ago
    updates, state = step(...)
    service.take(state)                 send the statistics of due blocks to the host

Roots of the statistics after `t` accepted steps are used exactly from step t + 1 + delay. If they are late, the step
waits and the stall is counted. Each process solves for its own devices, without communication.

Skipped steps do not count for the delay. The host reads the count of a step one step late, so as not to wait for the
device. It therefore offers the next roots as if the latest step was accepted, and the program that installs them
compares the count on the device. Roots that were not installed are offered again.
"""

import dataclasses
import itertools
import operator
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from ..linalg import blas
from ..linalg.symmetric import unpack
from ..options import Options
from ..plan.blocks import Bucket
from ..refresh import phases_due, with_statistics, without_statistics
from .in_flight import InFlight, empty_bank, recalled, store
from .parcels import Parcels
from .workers import Workers, pool_size

# Share of the time spent waiting for roots above which `complaint` returns a warning.
_TOLERATED = 0.02
_HOST_KIND = "pinned_host"
# Longest wait of `close` for statistics that are being copied.
_READER_SECONDS = 5.0


class HostRootsError(RuntimeError):
    """A solver thread has failed. Roots in flight can still be saved."""


class Report(NamedTuple):
    """Totals since the service began."""

    steps: int  # calls of `install`
    solves: int  # blocks solved
    retries: int  # solves retried with a larger regulariser
    stalls: int  # steps that waited for roots
    stalled_seconds: float  # time these steps waited
    busy_seconds: float  # time all threads together spent solving
    seconds: float  # time since the service began

    def since(self, before: "Report") -> "Report":
        """Return the difference to an earlier report."""
        differences: Any = map(operator.sub, self, before)
        return Report(*differences)


class Event(NamedTuple):
    """An interval of a timeline, in seconds of perf_counter; `kind` is copy, solve, wait, take or install."""

    kind: str
    thread: str
    start: float
    end: float
    stamp: int


class _Work(NamedTuple):
    """One device's share of a launch: statistics, the array for the roots, and the solves that fill it."""

    device: Any
    taken: dict[str, tuple[np.ndarray, InFlight]]
    answer: np.ndarray
    solves: list[Future[None]]


@dataclasses.dataclass(eq=False)
class _Launch:
    """The statistics taken after one step.

    Attributes:
      count: int32 on the device, number of accepted steps; unchanged from the previous launch if the step was skipped.
      opened: future of the work of each parcel, for each device of the process.
      stamp: the count, once read.
      offered: launch whose roots were offered to the next step; None again once that step's count is read.
    """

    count: jax.Array | None
    opened: Future[list[list[_Work]]]
    stamp: int = 0
    offered: "_Launch | None" = None


class HostRoots:
    """The service. All processes of a run must make the same calls in the same order.

    Args:
      parcels: programs and layout of parcels.
      options: options of the optimizer, with refresh "host".
      events: list to which a timeline is appended, or None.
    """

    def __init__(self, parcels: Parcels, options: Options, events: list[Event] | None = None):
        self._parcels = parcels
        self._options = options
        self._events = events
        self._reader = Workers(1, "roots-reader")
        self._solvers = Workers(pool_size(options.host_workers), "roots")
        self._blas = blas.one_thread()
        self._tables: Any = None
        self._devices: dict[Any, int] = {}  # device of this process -> its number among all owners
        self._known = 0
        self._in_step = False
        self._last: Any = None
        self._unknown: deque[_Launch] = deque()
        self._flying: list[_Launch] = []
        self._counters = threading.Lock()
        self._steps = self._solves = self._retries = self._stalls = 0
        self._stalled_seconds = 0.0
        self._began = time.perf_counter()
        self._reported = self._complained = self.report()

    def start(self, state: Any) -> Any:
        """Take over the roots in flight of a state; return the state without them. The state's roots are donated."""
        owners = self._parcels.owners
        if owners.mesh is not None:
            by_block, replicated = owners.sharding(owners.by_block), owners.sharding(PartitionSpec())
        else:  # committed to its device, so that the second step needs no recompilation
            (by_block,) = state.count.devices()
            replicated, state = by_block, jax.device_put(state, by_block)
        self._tables = jax.device_put({b.name: b.due for b in self._parcels.buckets}, by_block)
        self._last = jax.device_put(np.int32(0), replicated)
        self._known = int(np.asarray(state.count))
        numbers = dict.fromkeys(state.count.devices(), 0) if owners.mesh is None else owners.numbers()
        self._devices = {d: i for d, i in numbers.items() if d.process_index == jax.process_index()}
        self._resume(state)
        buckets = {name: b._replace(in_flight=None) for name, b in state.buckets.items()}
        state = dataclasses.replace(state, buckets=buckets)
        # Compile both programs and copy the count. At count -1 nothing is installed.
        _, self._last = self._take(state, 0)
        nothing = [(device, self._parcels.empty_answer()) for device in self._devices]
        return self._put(state, nothing, at=-1, stamp=0)

    def install(self, state: Any) -> Any:
        """Return the state with the roots due for the next step. The state's roots are donated.

        Raises:
          HostRootsError: a solver thread failed; the state is unchanged.
        """
        if self._in_step:
            raise RuntimeError(
                "install: called twice without take, so that no roots are computed. Call take after each step."
            )
        self._in_step = True
        delay = self._options.delay
        self._steps += 1
        while len(self._unknown) > min(delay, 1):
            self._learn()
        launch = next((x for x in self._flying if x.stamp + delay == self._known + len(self._unknown)), None)
        if launch is None:
            return state
        for part in self._solved(launch)[: phases_due(launch.stamp, self._options)]:
            start = time.perf_counter()
            answers = [(work.device, work.answer) for work in part]
            state = self._put(state, answers, at=launch.stamp + delay, stamp=launch.stamp)
            self._note("install", start, launch.stamp)
        if self._unknown:
            self._unknown[-1].offered = launch
        else:
            self._flying.remove(launch)
        return state

    def take(self, state: Any) -> None:
        """Copy the statistics of due blocks after a step, and solve when they arrive."""
        if not self._in_step:
            raise RuntimeError(
                "take: called without install, so that roots are not used. Call install before each step."
            )
        self._in_step = False
        start = time.perf_counter()
        counts = range(self._known + 1, self._known + len(self._unknown) + 2)
        phases = max(phases_due(count, self._options) for count in counts)
        parcels, count = [], self._last
        for number in range(max(phases, 1)):
            parcel, count = self._take(state, number)
            parcel.copy_to_host_async()
            parcels.append(parcel)
        self._last = count
        self._unknown.append(_Launch(count, self._reader.submit(self._open, parcels)))
        self._note("take", start, self._known + len(self._unknown))

    def with_in_flight(self, state: Any) -> Any:
        """Return the state with statistics in flight, for a checkpoint, without waiting for solves."""
        while self._unknown:
            self._learn()
        banks = {device: {b.name: empty_bank(b) for b in self._parcels.buckets} for device in self._devices}
        for launch in self._flying:
            if launch.opened.exception() is not None:
                continue  # the run is about to fail; these blocks keep their roots until they are due again
            for work in itertools.chain(*launch.opened.result()):
                for bucket in self._parcels.buckets:
                    store(banks[work.device][bucket.name], *work.taken[bucket.name])
        buckets = dict(state.buckets)
        for bucket in self._parcels.buckets:
            shards = [bank[bucket.name] for bank in banks.values()]
            in_flight = jax.tree.map(lambda *parts: self._assemble(list(self._devices), parts, host=True), *shards)
            buckets[bucket.name] = buckets[bucket.name]._replace(in_flight=in_flight)
        return dataclasses.replace(state, buckets=buckets)

    def report(self) -> Report:
        """Return the totals so far."""
        with self._counters:
            counts = self._steps, self._solves, self._retries, self._stalls
            seconds = time.perf_counter() - self._began
            return Report(*counts, self._stalled_seconds, self._solvers.busy_seconds, seconds)

    def metrics(self) -> dict[str, float]:
        """Return the totals so far, and the share of time the threads were busy since the last call."""
        now, before = self.report(), self._reported
        self._reported = now
        names = "solves", "retries", "stalls", "stalled_seconds"
        return {f"host/{name}": getattr(now, name) for name in names} | {"host/busy": self._busy(now.since(before))}

    def complaint(self) -> str | None:
        """Return a warning with a fix if waiting for roots took more than 2 % of the time since the last call."""
        now, options = self.report(), self._options
        new, self._complained = now.since(self._complained), now
        if new.stalled_seconds <= _TOLERATED * new.seconds:
            return None
        busy = self._busy(new)
        # A busy pool is too slow; an idle one needs a longer delay.
        knob = f"raise delay ({options.delay})"
        if busy > 0.8:
            knob = f"raise interval ({options.interval}) or host_workers ({self._solvers.count})"
        return (
            f"roots came late: {new.stalls} of {new.steps} steps waited {new.stalled_seconds:.2f} s for the host, "
            f"whose threads were busy {busy:.0%} of the time; {knob}"
        )

    def _busy(self, report: Report) -> float:
        return min(report.busy_seconds / (report.seconds * self._solvers.count), 1.0) if report.seconds else 0.0

    def close(self) -> None:
        """Stop solving, without waiting for solves."""
        self._solvers.close()
        self._reader.close()
        # The process would abort if the interpreter ended while the reader is inside JAX. It waits for a step at most.
        wait([launch.opened for launch in (*self._unknown, *self._flying)], timeout=_READER_SECONDS)
        self._blas.restore_original_limits()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _learn(self) -> None:
        """Read the oldest unknown count, which tells if its step was skipped and if roots were installed after it."""
        launch = self._unknown.popleft()
        stamp = int(np.asarray(launch.count))
        if stamp > self._known:
            launch.stamp = stamp
            self._flying.append(launch)
        self._known = stamp
        offered, launch.offered = launch.offered, None  # launches must not form a chain
        if offered is not None and offered.stamp + self._options.delay == stamp:
            self._flying.remove(offered)

    def _solved(self, launch: _Launch) -> list[list[_Work]]:
        """Return the work of a launch, waiting until it is solved."""
        start = time.perf_counter()
        try:
            parts = launch.opened.result()
            late = False
            for solve in (solve for work in itertools.chain(*parts) for solve in work.solves):
                late |= not solve.done()
                solve.result()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise HostRootsError(f"a thread that takes roots on the host died: {why}") from error
        if late:
            with self._counters:
                self._stalls += 1
                self._stalled_seconds += time.perf_counter() - start
            self._note("wait", start, launch.stamp)
        return parts

    def _open(self, parcels: list[jax.Array]) -> list[list[_Work]]:
        """Wait for statistics to arrive, and submit the solves; runs in the reader's thread."""
        parts = []
        while parcels:
            parcel = jax.block_until_ready(parcels.pop(0))  # frees the devices' copies one by one
            part = []
            for shard in parcel.addressable_shards:
                start = time.perf_counter()
                taken = self._parcels.taken(np.asarray(shard.data)[0])
                self._note("copy", start, 0)
                part.append(self._begin(shard.device, taken))
            parts.append(part)
        return parts

    def _begin(self, device: Any, taken: dict[str, tuple[np.ndarray, InFlight]]) -> _Work:
        """Submit the solves of a device's shard of a parcel."""
        # A new array per parcel, because a device may use it without a copy.
        answer = self._parcels.empty_answer()
        places = self._parcels.answers(answer)
        solves = []
        for bucket in self._parcels.buckets:
            (slot, statistics), (slots, scale_log2, found) = taken[bucket.name], places[bucket.name]
            sizes = bucket.real_sizes.reshape(*bucket.slots.shape, -1)[self._devices[device]]
            for i in np.flatnonzero(slot < bucket.slots.shape[1]):
                slots[i], scale_log2[i] = slot[i], statistics.scale_log2[i]
                part = jax.tree.map(lambda x, i=i: x[i], statistics)
                solves.append(self._solvers.submit(self._solve, bucket, part, sizes[slot[i]], found, i))
        return _Work(device, taken, answer, solves)

    def _solve(self, bucket: Bucket, taken: InFlight, sizes: np.ndarray, found: Any, i: int) -> None:
        """Solve for one block and write the result to row i of `found`; runs in a worker's thread."""
        start = time.perf_counter()
        age = int(taken.age) + bucket.preconditioner.prior(len(bucket.sides))
        divisor = 1 - bucket.beta2**age if bucket.beta2 < 1 and age > 0 else 1.0
        sides, retries = [], 0
        for packed, side in zip(taken.statistics, bucket.sides, strict=True):
            whole = unpack(packed, bucket.shape[side])[: sizes[side], : sizes[side]]
            result, tried = bucket.preconditioner.solve_on_host(
                whole.astype(np.float64) / divisor, bucket, self._options
            )
            retries += tried
            sides.append(result)
        if all(side.accepted for side in sides):
            for place, side in zip(found.root, sides, strict=True):
                place[i][: len(side.root), : len(side.root)] = side.root
            found.residual[i] = max(side.residual for side in sides)
            found.condition[i] = max(side.condition for side in sides)
            found.effective_rank[i] = min(side.effective_rank for side in sides)
            found.accepted[i] = True
        found.largest[i] = min(side.largest for side in sides)
        with self._counters:
            self._solves += 1
            self._retries += retries
        self._note("solve", start, 0)

    def _take(self, state: Any, number: int) -> tuple[jax.Array, jax.Array]:
        roots = {b.name: state.buckets[b.name].roots for b in self._parcels.buckets}
        return self._parcels.take(roots, self._tables, state.count, self._last, np.int32(number))

    def _put(self, state: Any, answers: list[tuple[Any, np.ndarray]], *, at: int, stamp: int) -> Any:
        """Return the state with the answers of all devices installed."""
        parcel = self._assemble([device for device, _ in answers], [answer[None] for _, answer in answers])
        written = {b.name: without_statistics(state.buckets[b.name].roots) for b in self._parcels.buckets}
        installed = self._parcels.install(written, parcel, state.count, np.int32(at), np.int32(stamp))
        buckets = dict(state.buckets)
        for name, roots in installed.items():
            buckets[name] = buckets[name]._replace(roots=with_statistics(roots, buckets[name].roots))
        return dataclasses.replace(state, buckets=buckets)

    def _assemble(self, devices: Sequence[Any], parts: Sequence[np.ndarray], *, host: bool = False) -> jax.Array:
        """Return one array of the devices' shards along axis 0; if `host`, in pinned host memory where supported."""
        owners = self._parcels.owners
        if owners.mesh is None:
            return jax.device_put(parts[0], devices[0])
        sharding = owners.sharding(owners.by_block)
        if host and all(_HOST_KIND in {m.kind for m in d.addressable_memories()} for d in devices):
            sharding = sharding.with_memory_kind(_HOST_KIND)
        shape = (owners.count * parts[0].shape[0], *parts[0].shape[1:])
        places = sharding.addressable_devices_indices_map(shape)
        by_device = dict(zip(devices, parts, strict=True))
        kind = sharding.memory_kind
        arrays = [jax.device_put(by_device[d], jax.sharding.SingleDeviceSharding(d, memory_kind=kind)) for d in places]
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    def _resume(self, state: Any) -> None:
        """Submit the statistics in flight of a checkpoint in the same parcels as originally."""
        buckets = self._parcels.buckets
        if not buckets or state.buckets[buckets[0].name].in_flight is None:
            return
        kept: dict[Any, dict[str, InFlight]] = {device: {} for device in self._devices}
        for bucket in buckets:
            for device in kept:
                kept[device][bucket.name] = jax.tree.map(
                    lambda x, device=device: np.array(next(s.data for s in x.addressable_shards if s.device == device)),
                    state.buckets[bucket.name].in_flight,
                )
        for stamp in range(max(1, self._known - self._options.delay), self._known + 1):
            parts: list[list[_Work]] = [[] for _ in range(phases_due(stamp, self._options))]
            for device, by_name in kept.items():
                due = {b.name: np.flatnonzero(by_name[b.name].stamp == stamp) for b in buckets}
                for number, part in enumerate(parts):
                    taken = {}
                    for bucket in buckets:
                        window = self._parcels.window(bucket)
                        slots = due[bucket.name][number * window : (number + 1) * window]
                        taken[bucket.name] = recalled(by_name[bucket.name], slots, window)
                    part.append(self._begin(device, taken))
            opened: Future[list[list[_Work]]] = Future()
            opened.set_result(parts)
            self._flying.append(_Launch(None, opened, stamp))

    def _note(self, kind: str, start: float, stamp: int) -> None:
        if self._events is not None:
            thread = threading.current_thread().name
            self._events.append(Event(kind, thread, start, time.perf_counter(), stamp))
