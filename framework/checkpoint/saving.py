"""Save checkpoints in the background through Orbax, and choose which are kept."""

import contextlib
import dataclasses
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from ..base import paths
from ..base import workdir as layout
from ..base.errors import UserError, first_line, told
from ..base.paths import Path
from ..distributed import agreement
from ..distributed.barrier import Barriers
from . import shelf, store, verify, workarounds
from .record import Ranking, Record

_IN_FLIGHT = 0.05  # of a process' share of a state, encoded in memory while it is written


def _storage_errors() -> tuple[type[Exception], ...]:
    """Return the errors of a save: Orbax and TensorStore wrap those of the file system in their own."""
    return *paths.errors(), ValueError, RuntimeError, UserError


class SaveError(Exception):
    """A checkpoint could not be saved. Earlier checkpoints are not affected."""


def kept(steps: Iterable[int], ranks: Mapping[int, float | None], *, last: int, best: int, every: int = 0) -> set[int]:
    """Return the steps whose checkpoints are kept.

    Args:
      steps: of all checkpoints.
      ranks: step -> rank, None or absent without an evaluation.
      last: number of newest checkpoints, at least 1.
      best: number of checkpoints with the lowest ranks.
      every: keep the first checkpoint of every such number of steps for good; 0 keeps none.
    """
    steps = sorted(steps)
    ranked = sorted((rank, step) for step in steps if (rank := ranks.get(step)) is not None)
    firsts = {step // every: step for step in reversed(steps) if step >= every} if every else {}
    return {*steps[-last:], *(step for _, step in ranked[:best]), *firsts.values()}


class Checkpoints:
    """Saves the checkpoints of a run and deletes those that are no longer kept. Every process calls its methods.

    Process 0 decides what is saved, and deletes. A checkpoint that cannot be deleted is reported and tried again after
    the next save.

    Args:
      workdir: the run's.
      keep_last, keep_best, keep_every: see `kept`.
      ranking: orders checkpoints from best to worst.
      still_ours: raises UserError in all processes if another run has taken over the workdir.
      before_commit: called in the background before a checkpoint or its evaluation is written.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep_last: int,
        keep_best: int,
        keep_every: int = 0,
        ranking: Ranking,
        still_ours: Callable[[], None] = lambda: None,
        before_commit: Callable[[], None] = lambda: None,
    ):
        """Remove what interrupted saves and deletions have left behind."""
        workarounds.apply()
        self._workdir, self._directory = workdir, paths.of(workdir) / layout.CHECKPOINTS
        self._ranking, self._still_ours, self._before_commit = ranking, still_ours, before_commit
        self._first = jax.process_index() == 0
        saved = agreement.first(
            lambda: [(int(path.name), rank) for path, rank in store.ranks(workdir, ranking).items()]
        )
        self._ranks: dict[int, float | None] = dict(saved)
        self._kept = functools.partial(kept, ranks=self._ranks, last=keep_last, best=keep_best, every=keep_every)
        self._there = {*self._ranks}  # steps that are saved
        self._step = 0
        self._failure = ""
        self._undeletable: set[int] = set()
        self._warnings: list[str] = []
        self._metrics: dict[str, float] = {}
        # Saving is not urgent once the state is copied. Threads that this one starts inherit its priority.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints", initializer=_give_way)
        self._ending: Future[None] | None = None  # of the save in progress
        self._barriers = Barriers()
        self._writer: ocp.AsyncCheckpointer | None = None  # from the first save on
        self._remove_partial()

    def save(self, state: Any, record: Record, manifest: dict[str, Any]) -> None:
        """Save in the background; returns once the state is copied off the devices and may be donated.

        A step that is already saved is skipped.

        Raises:
          SaveError: the save before it has failed or, with several processes, this one could not begin; on all
            processes if it did on any. A single process raises the latter at the next save, or in `confirm`.
          UserError: another run has taken over the workdir.
        """
        begun = time.perf_counter()
        self._still_ours()
        failure = self._settle()
        self._ranks[record.step] = record.rank(self._ranking)
        if not agreement.first(lambda: record.step in self._there):
            failure = self._begin(state, record, manifest, begun) or failure
            self._metrics["checkpoint/blocked_seconds"] = time.perf_counter() - begun
        if failure:
            raise SaveError(failure)

    def evaluated(self, record: Record) -> None:
        """Rank a step that has been evaluated, and add the evaluation to its checkpoint if it has one."""
        self._ranks[record.step] = record.rank(self._ranking)
        if self._first:
            self._thread.submit(self._write_evaluation, record)

    def confirm(self) -> None:
        """Wait for the save in progress, and delete checkpoints that are no longer kept.

        Raises:
          SaveError: the save has failed; on all processes if it did on any.
        """
        if failure := self._settle():
            raise SaveError(failure)
        self._prune()

    def metrics(self) -> dict[str, float]:
        """Return seconds and bytes of the newest save, seconds that training waited for it, and `note_restored`."""
        return dict(self._metrics)

    def note_restored(self, path: Path, seconds: float) -> None:
        """Add to the metrics that a checkpoint was restored, and how long that took."""
        self._metrics["checkpoint/restore_seconds"] = seconds
        self._metrics["checkpoint/restore_bytes"] = float(verify.size(path))

    def complaint(self) -> str | None:
        """Return warnings about checkpoints that cannot be deleted, each once."""
        return "\n".join(self._warnings.pop() for _ in range(len(self._warnings))) or None

    def close(self) -> None:
        """Wait for the save in progress, without a report of its failure; see `confirm`."""
        self._outcome(self._finish)
        self._thread.shutdown()
        if self._writer:
            self._outcome(self._writer.close)

    def _begin(self, state: Any, record: Record, manifest: dict[str, Any], begun: float) -> str:
        """Begin a save; with several processes returns why it failed in any of them."""
        alone = jax.process_count() == 1
        items = {
            store.STATE: ocp.args.PyTreeSave(_copied(state) if alone else state),
            store.RECORD: ocp.args.JsonSave(dataclasses.asdict(record)),
            store.MANIFEST: ocp.args.JsonSave(manifest),
        }
        self._step = record.step
        path = self._directory / str(record.step)
        self._writer = writer = self._writer or self._opened(state)
        beginning = self._thread.submit(self._start, writer, path, ocp.args.Composite(**items))
        failure = "" if alone else _any(self._outcome(beginning.result))
        if failure:
            self._outcome(writer.wait_until_finished)  # what the others have begun, which fails, too
            self._remove_partial()
        self._ending = None if failure else self._thread.submit(self._end, writer, beginning, path, begun)
        return failure

    def _opened(self, state: Any) -> ocp.AsyncCheckpointer:
        """Return the writer of checkpoints of this state.

        It writes as much at a time as a twentieth of this process' share. Without a limit, all would be in memory
        twice: copied from the devices, and encoded.
        """
        share = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / jax.process_count()
        # Of an array with replicas any process may write a whole shard.
        largest = max(shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards)
        limit = max(_IN_FLIGHT * share, largest + 1, 1 << 20)
        handler = ocp.CompositeCheckpointHandler(
            **{
                store.STATE: ocp.PyTreeCheckpointHandler(save_concurrent_gb=limit / 1e9),  # pyright: ignore
                store.RECORD: ocp.JsonCheckpointHandler(),
                store.MANIFEST: ocp.JsonCheckpointHandler(),
            }
        )
        meet = ocp.AsyncOptions(barrier_sync_fn=lambda *, key, timeout_ms: self._barriers.wait(timeout_ms / 1000))
        return ocp.AsyncCheckpointer(handler, async_options=meet)

    def _start(self, writer: ocp.AsyncCheckpointer, path: Path, items: ocp.args.Composite) -> None:
        """Begin to write; if it fails in one process, it fails in all."""
        if jax.process_count() == 1:
            self._before(path)
            writer.save(path, args=items, force=True)
            return
        self._barriers.begin()
        with self._failing_together(), workarounds.meeting_by(self._barriers.wait):
            self._before(path)
            writer.save(path, args=items, force=True)

    def _before(self, path: Path) -> None:
        if self._first:
            self._before_commit()
            shelf.make_room(path)

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Let other processes fail at once, which wait for this one, if it fails."""
        try:
            yield
        except _storage_errors() as error:
            if jax.process_count() > 1:
                self._barriers.fail(first_line(error))
                workarounds.release()
            raise

    def _end(self, writer: ocp.AsyncCheckpointer, beginning: Future[Any], path: Path, begun: float) -> None:
        """Wait in the background until a save is committed, check it, write its checksums, delete others."""
        beginning.result()
        with self._failing_together():
            writer.wait_until_finished()
        self._metrics["checkpoint/seconds"] = time.perf_counter() - begun
        if self._first:
            store.arrays(path)  # a checkpoint counts once its index can be read back
        self._there.add(self._step)
        verify.write(path, jax.process_index(), jax.process_count())
        self._metrics["checkpoint/bytes"] = float(verify.size(path))
        self._prune()
        workarounds.return_free_memory()

    def _settle(self) -> str:
        """Wait for the save in progress; returns why it failed in any process, "" if it did not."""
        failure = _any(self._outcome(self._finish))
        if failure:
            self._remove_partial()
        return failure

    def _finish(self) -> None:
        ending, self._ending = self._ending, None
        if ending is not None:
            ending.result()
            self._thread.submit(lambda: None).result()  # until the evaluation is written, too

    def _outcome(self, action: Callable[[], Any]) -> str:
        """Run an action; returns why it or an earlier one failed, "" if neither did."""
        failure, self._failure = self._failure, ""
        try:
            action()
        except _storage_errors() as error:
            newest = f"the newest one is of step {max(self._there)}" if self._there else "there is no earlier one"
            step = f"the checkpoint of step {self._step}"
            failure = f"{step} could not be saved in {self._directory} ({first_line(error)}); {newest}"
        return failure

    def _remove_partial(self) -> None:
        """Remove what interrupted saves and deletions have left."""
        if self._first:
            with contextlib.suppress(*paths.errors()):
                shelf.remove_partial(self._workdir)

    def _prune(self) -> None:
        """Delete the checkpoints that are not kept, damaged ones of steps that are saved again, and partial ones.

        Orbax may still write files of a failed save when it reports the failure, so they are removed here once more.
        """
        self._remove_partial()
        for step in sorted(self._there - self._kept(self._there)):
            self._delete(step)
        if self._first:
            with contextlib.suppress(*paths.errors()):
                shelf.remove_damaged(self._workdir, self._step)

    def _delete(self, step: int) -> None:
        path = self._directory / str(step)
        try:
            if self._first:
                shelf.delete(path)
            self._there.discard(step)
        except paths.errors() as error:
            if step not in self._undeletable:
                self._undeletable.add(step)
                reason = f"checkpoint {path} cannot be deleted ({told(error)})"
                self._warnings.append(f"warning: {reason}. It is tried again after each save.")

    def _write_evaluation(self, record: Record) -> None:
        path = self._directory / str(record.step)
        try:
            if record.step in self._there:
                self._before_commit()
                store.write_evaluation(path, record)
        except paths.errors() as error:
            self._failure = f"the evaluation of step {record.step} could not be saved in {path} ({error})"


def pruning(workdir: Path, *, keep_last: int, keep_best: int) -> dict[Path, str]:
    """Choose the checkpoints of a workdir to delete. Checkpoints are verified before they are kept.

    Returns:
      Checkpoint -> "" if it is to be deleted, else why it is not; oldest first.

    Raises:
      UserError: there is no intact one, so that none may be deleted.
    """
    found = {int(path.name): path for path in store.in_workdir(workdir)}
    ranks = {int(path.name): rank for path, rank in store.ranks(workdir, store.ranking(workdir)).items()}
    verdicts: dict[int, str] = {}
    while True:
        intact = [step for step in found if verdicts.get(step, "kept") == "kept"]
        keep = kept(intact, ranks, last=keep_last, best=keep_best)
        if keep <= verdicts.keys():
            break
        for step in keep - verdicts.keys():
            faults = store.faults(found[step])
            verdicts[step] = f"damaged, left alone ({faults[0]})" if faults else "kept"
    if not keep:
        raise UserError(f"every checkpoint of {workdir} is damaged ({verdicts}); none is deleted")
    return {path: verdicts.get(step, "") for step, path in found.items()}


def _give_way() -> None:
    """Lower the priority of this thread to a tenth. Only Linux has priorities of threads.

    With a lower one, other programs on a busy machine hold up saves for minutes, and training with them: it waits for
    Python's lock while the thread that holds it gets no core.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _copied(state: Any) -> Any:
    """Copy a state to the host's memory, without replicas, and wait for it, so that the state may be donated."""
    state = jax.tree.map(_without_replicas, state)
    shardings = jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), state)
    return jax.block_until_ready(jax.device_put(state, shardings, may_alias=False))


def _without_replicas(array: jax.Array) -> jax.Array:
    """Return the same array on the first devices that hold all of it."""
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding):
        return array
    used = {name for part in sharding.spec for name in (part if isinstance(part, tuple) else (part,))}
    names = tuple(name for name in sharding.mesh.axis_names if name in used)
    devices: Any = sharding.mesh.devices
    devices = devices[tuple(slice(None) if name in used else 0 for name in sharding.mesh.axis_names)]
    if names:
        sharding = NamedSharding(Mesh(devices, names), sharding.spec, memory_kind=sharding.memory_kind)
    else:
        sharding = SingleDeviceSharding(devices, memory_kind=sharding.memory_kind)
    shards = {shard.device: shard.data for shard in array.addressable_shards}
    return jax.make_array_from_single_device_arrays(array.shape, sharding, [shards[x] for x in sharding.device_set])


def _any(failure: str) -> str:
    """Return the first failure of all processes, or ""."""
    return next(filter(None, agreement.gather(failure)), "")
