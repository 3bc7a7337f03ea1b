"""Save checkpoints in the background through Orbax's manager, and choose which are kept."""

import contextlib
import dataclasses
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ..base import workdir as layout
from ..base.errors import UserError
from ..distributed import agreement
from . import store, verify
from .record import Ranking, Record

DELETED = "deleted"  # folder among the checkpoints, into which Orbax renames those to be deleted
# Orbax and TensorStore wrap the errors of the file system in their own.
_STORAGE_ERRORS = (OSError, ValueError, RuntimeError, TimeoutError)


class SaveError(Exception):
    """A checkpoint could not be saved. Earlier checkpoints are not affected."""


@dataclasses.dataclass(frozen=True)
class Retention(checkpoint_managers.PreservationPolicy):
    """Choose the checkpoints to keep.

    Attributes:
      last: number of newest checkpoints.
      best: number of checkpoints with the lowest ranks.
      every: keep the first checkpoint of every such number of steps for good; 0 keeps none.
      milestone: whether a rollback may return to a step. The newest such checkpoint is kept.
      ranks: step -> rank, None or absent without an evaluation. Grows during the run.
    """

    last: int
    best: int
    every: int = 0
    milestone: Callable[[int], bool] = lambda step: False
    ranks: Mapping[int, float | None] = dataclasses.field(default_factory=dict)

    def kept(self, steps: Iterable[int]) -> set[int]:
        """Return which of the steps of all checkpoints are kept."""
        steps = sorted(steps)
        ranked = sorted((rank, step) for step in steps if (rank := self.ranks.get(step)) is not None)
        best = [step for _, step in ranked[: self.best]]
        firsts: dict[int, int] = {}
        for step in steps:
            if self.every and step >= self.every:
                firsts.setdefault(step // self.every, step)
        back = [step for step in steps if self.milestone(step)][-1:]
        return {*steps[max(len(steps) - self.last, 0) :], *best, *firsts.values(), *back}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Answer Orbax's manager."""
        kept = self.kept(each.step for each in checkpoints)
        return [each.step in kept for each in checkpoints]


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its calls of JAX's preemption service.

    The service takes the number that a process last asked with for its progress. The loop counts its own questions;
    those of the manager, which come from a background thread, too, would let a run miss the moment to stop.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """Saves the checkpoints of a run and deletes those that are no longer kept. Every process calls its methods.

    Args:
      workdir: the run's.
      keep_last, keep_best, keep_every, milestone: see `Retention`.
      ranking: orders checkpoints from best to worst.
      still_ours: raises UserError in all processes if another run has taken over the workdir.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep_last: int,
        keep_best: int,
        keep_every: int = 0,
        ranking: Ranking,
        milestone: Callable[[int], bool] = lambda step: False,
        still_ours: Callable[[], None] = lambda: None,
    ):
        """Remove what interrupted saves and deletions have left behind."""
        self._directory = (workdir / layout.CHECKPOINTS).absolute()
        self._ranking, self._still_ours = ranking, still_ours
        self._first = jax.process_index() == 0
        self._ranks: dict[int, float | None] = dict(agreement.first(self._saved_ranks))
        self._retention = Retention(keep_last, keep_best, keep_every, milestone, self._ranks)
        self._step = 0
        self._failure = self._told = ""
        self._metrics: dict[str, float] = {}
        # Saving is not urgent once the state is copied. Threads that this one starts inherit its priority.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints", initializer=_give_way)
        self._ending: Future[None] | None = None  # of the save in progress
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._retention,
            todelete_subdir=DELETED,  # a checkpoint disappears at once, its files later
            cleanup_tmp_directories=True,
            single_host_load_and_broadcast=True,  # process 0 lists the directory for all
            lightweight_initialize=True,
            save_root_metadata=False,
        )
        self._manager = _Manager(self._directory, options=options)
        self._empty_trash()

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
        if record.step not in self._manager.all_steps():
            failure = self._begin(state, record, manifest, begun) or failure
            self._metrics["checkpoint/blocked_seconds"] = time.perf_counter() - begun
        if failure:
            raise SaveError(failure)

    def evaluated(self, record: Record) -> None:
        """Rank a step that has been evaluated, and add the evaluation to its checkpoint if it has one."""
        self._ranks[record.step] = record.rank(self._ranking)
        path = self._directory / str(record.step)
        if self._first:
            self._thread.submit(self._write_evaluation, path, record)

    def confirm(self) -> None:
        """Wait for the save in progress, and delete checkpoints that are no longer kept.

        Raises:
          SaveError: the save has failed; on all processes if it did on any.
        """
        if failure := self._settle():
            raise SaveError(failure)
        steps = self._manager.all_steps()
        self._delete({*steps} - self._retention.kept(steps))

    def forget_after(self, last: int) -> None:
        """Delete the checkpoints of steps after `last`, before the run goes back to it. Call `confirm` first."""
        self._delete({step for step in self._manager.all_steps() if step > last})

    def metrics(self) -> dict[str, float]:
        """Return seconds and bytes of the newest save, seconds that training waited for it, and `note_restored`."""
        return dict(self._metrics)

    def note_restored(self, path: Path, seconds: float) -> None:
        """Add to the metrics that a checkpoint was restored, and how long that took."""
        self._metrics["checkpoint/restore_seconds"] = seconds
        self._metrics["checkpoint/restore_bytes"] = float(verify.size(path))

    def complaint(self) -> str | None:
        """Return a warning if a save has failed in this process, once, before all processes learn of it."""
        if self._ending is not None and self._ending.done():
            self._failure = self._outcome(self._finish)
        told, self._told = self._failure != self._told, self._failure
        return f"warning: {self._failure}" if told and self._failure else None

    def close(self) -> None:
        """Wait for the save in progress, without a report of its failure; see `confirm`."""
        self._outcome(self._finish)
        self._thread.shutdown()
        self._outcome(self._manager.close)

    def _begin(self, state: Any, record: Record, manifest: dict[str, Any], begun: float) -> str:
        """Begin a save; with several processes returns why it failed in any of them."""
        alone = jax.process_count() == 1
        items = {
            store.STATE: ocp.args.PyTreeSave(_copied(state) if alone else state),
            store.RECORD: ocp.args.JsonSave(record.to_json()),
            store.MANIFEST: ocp.args.JsonSave(manifest),
        }
        self._step = record.step
        beginning = self._thread.submit(self._manager.save, record.step, args=ocp.args.Composite(**items), force=True)
        # Several processes meet here in collectives, which must not run between those of steps.
        failure = "" if alone else _any(self._outcome(beginning.result))
        self._ending = None if failure else self._thread.submit(self._end, beginning, record.step, begun)
        return failure

    def _end(self, beginning: Future[bool], step: int, begun: float) -> None:
        """Wait in the background until Orbax has committed a save, and write the checksums."""
        beginning.result()
        self._manager.wait_until_finished()
        path = self._directory / str(step)
        self._metrics["checkpoint/seconds"] = time.perf_counter() - begun
        verify.write(path, jax.process_index(), jax.process_count())
        self._metrics["checkpoint/bytes"] = float(verify.size(path))
        self._empty_trash()

    def _settle(self) -> str:
        """Wait for the save in progress; returns why it failed in any process, "" if it did not."""
        failure = _any(self._outcome(self._finish))
        if failure:
            # The manager raises the failure once in every thread, and has taken checkpoints for deleted that are not.
            with contextlib.suppress(*_STORAGE_ERRORS):
                self._manager.wait_until_finished()
            self._manager.reload()
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
        except _STORAGE_ERRORS as error:
            steps = [int(path.name) for path in store.checkpoints(self._directory.parent)]
            newest = f"the newest one is of step {steps[-1]}" if steps else "there is no earlier one"
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            failure = (
                f"the checkpoint of step {self._step} could not be saved in {self._directory} ({reason}); {newest}"
            )
        return failure

    def _delete(self, steps: Iterable[int]) -> None:
        for step in sorted(steps):
            self._manager.delete(step)
        self._empty_trash()

    def _empty_trash(self) -> None:
        if self._first:
            shutil.rmtree(self._directory / DELETED, ignore_errors=True)

    def _saved_ranks(self) -> list[tuple[int, float | None]]:
        return [(int(path.name), rank) for path, rank in ranks(self._directory.parent, self._ranking).items()]

    def _write_evaluation(self, path: Path, record: Record) -> None:
        try:
            if path.is_dir():
                store.write_evaluation(path, record)
        except OSError as error:
            self._failure = f"the evaluation of step {record.step} could not be saved in {path} ({error})"


def ranks(workdir: Path, ranking: Ranking) -> dict[Path, float | None]:
    """Return the rank of each checkpoint of a workdir; a damaged one has none."""
    found: dict[Path, float | None] = {}
    for path in store.checkpoints(workdir):
        try:
            found[path] = store.record(path).rank(ranking)
        except UserError:
            found[path] = None
    return found


@dataclasses.dataclass(frozen=True)
class Pruning:
    """The effect of `prune` on the checkpoints of a workdir, each oldest first.

    Attributes:
      doomed: to be deleted.
      kept: the newest and the best intact ones.
      damaged: would be kept but are damaged, each with its first fault. They are left alone.
    """

    doomed: tuple[Path, ...]
    kept: tuple[Path, ...]
    damaged: tuple[tuple[Path, str], ...]


def pruning(workdir: Path, *, keep_last: int, keep_best: int) -> Pruning:
    """Choose the checkpoints of a workdir to delete. Checkpoints are verified before they are kept.

    Raises:
      UserError: there is no intact one, so that none may be deleted.
    """
    found = {int(path.name): path for path in store.in_workdir(workdir)}
    ranking = store.ranking(workdir)
    of_steps = {int(path.name): rank for path, rank in ranks(workdir, ranking).items()}
    retention = Retention(keep_last, keep_best, ranks=of_steps)
    faults: dict[int, list[str]] = {}
    while unknown := retention.kept(step for step in found if not faults.get(step)) - faults.keys():
        faults |= {step: store.faults(found[step]) for step in unknown}
    kept = [step for step in found if faults.get(step) == []]
    damaged = [(found[step], faults[step][0]) for step in found if faults.get(step)]
    if not kept:
        raise UserError(f"{store.all_damaged(str(workdir), damaged)}; none is deleted")
    kept = retention.kept(kept)
    doomed = [step for step in found if step not in kept and not faults.get(step)]
    return Pruning(tuple(map(found.__getitem__, doomed)), tuple(found[step] for step in sorted(kept)), tuple(damaged))


def delete(paths: Iterable[Path]) -> None:
    """Delete checkpoints; each disappears at once, before its files are deleted."""
    for path in paths:
        doomed = path.parent / DELETED / path.name
        doomed.parent.mkdir(exist_ok=True)
        path.rename(doomed)
        shutil.rmtree(doomed.parent)


def _give_way() -> None:
    """Lower the priority of this thread to a tenth. Only Linux has priorities of threads.

    With a lower one, other programs on a busy machine hold up saves for minutes, and training with them: it waits for
    Python's lock while the thread that holds it gets no core.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _copied(state: Any) -> Any:
    """Copy a state to the host's memory and wait for it, so that the state may be donated."""
    shardings = jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), state)
    return jax.block_until_ready(jax.device_put(state, shardings, may_alias=False))


def _any(failure: str) -> str:
    """Return the first failure of all processes, or ""."""
    return next(filter(None, agreement.gather(failure)), "")
