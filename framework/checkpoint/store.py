"""Checkpoints of a workdir: saved in the background, whole or invisible, read back by name. All that knows Orbax.

A checkpoint is a directory named by its step. It holds `state` (arrays, in Orbax's form), `record` and `manifest`
(JSON), and SHA256SUMS, which is written last: without it the directory is not a checkpoint.
"""

import contextlib
import dataclasses
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ...optimizers.plan import patterns
from ..base import workdir as layout
from ..base.errors import UserError
from ..distributed import agreement
from . import evaluations, integrity
from .record import Record

_STATE, _RECORD, _MANIFEST = "state", "record", "manifest"
# What stands in the names of checkpoints on their way in, which Orbax gives, and on their way out.
_UNFINISHED, _DELETED = ".orbax-checkpoint-tmp", ".deleted"
# What goes wrong with storage. Orbax and TensorStore wrap the system's errors in their own.
_STORAGE_ERRORS = (OSError, ValueError, RuntimeError, TimeoutError)


class SaveError(Exception):
    """A checkpoint could not be saved; those before it are as they were."""


@dataclasses.dataclass(frozen=True)
class Array:
    """Shape and type of a saved array."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def bytes(self) -> int:
        """Its size in memory."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def __str__(self):
        return f"{np.dtype(self.dtype).name}[{','.join(map(str, self.shape))}]"


def numbered(workdir: Path) -> list[Path]:
    """What a workdir has in the places of checkpoints, oldest first, finished or not."""
    directory = workdir / layout.CHECKPOINTS
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))


def finished(workdir: Path) -> list[Path]:
    """The checkpoints of a workdir, oldest first; those whose save was cut short are none."""
    return [path for path in numbered(workdir) if integrity.is_sealed(path)]


def record(path: Path) -> Record:
    """Return the record of a checkpoint, with the evaluation of its step if that was finished.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return evaluations.applied(Record.from_json(_json(path, _RECORD)), path.parent.parent)
    except ValueError as error:
        raise UserError(f"checkpoint {path}: {error}; use another one") from error


def manifest(path: Path) -> dict[str, Any]:
    """What describes a checkpoint's arrays; see the module `takeover`.

    Raises:
      UserError: it cannot be read.
    """
    content = _json(path, _MANIFEST)
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} has no manifest; use another one")
    return content


def arrays(path: Path) -> dict[str, Array]:
    """Shape and type of every array of a checkpoint, by its path in the train state; no array is read.

    Raises:
      UserError: what describes them cannot be read.
    """
    with _readable(path):
        return {name: Array(tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in _by_name(_tree(path)).items()}


def read(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Some arrays of a checkpoint.

    Args:
      path: the checkpoint.
      wanted: name -> ShapeDtypeStruct with a sharding for an array on the devices, None for one in NumPy. Shapes are to
        be those of `arrays`.

    Raises:
      UserError: they cannot be read.
    """
    if not wanted:
        return {}
    with _readable(path):
        return _read(path, wanted)


def _read(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    tree = _tree(path)
    names = patterns.paths(tree)

    def item(name: str) -> Any:
        return 0 if name in wanted else ocp.PLACEHOLDER

    def restore_args(name: str) -> Any:
        like = wanted.get(name)
        if like is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=like.sharding, global_shape=like.shape, dtype=like.dtype)

    structure = jax.tree.structure(tree)
    items, args = (jax.tree.unflatten(structure, list(map(make, names))) for make in (item, restore_args))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(path.absolute() / _STATE, args=ocp.args.PyTreeRestore(items, restore_args=args))
    return {name: value for name, value in _by_name(restored).items() if name in wanted}


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # what damaged metadata end in is any of a dozen, of Orbax, TensorStore and NumPy
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise UserError(
            f"the arrays of checkpoint {path} cannot be read ({type(error).__name__} {reason:.200}); use another one"
        ) from error


def _tree(path: Path) -> Any:
    return ocp.PyTreeCheckpointHandler().metadata(path.absolute() / _STATE).tree  # type: ignore  (for etils' paths)


def _by_name(tree: Any) -> dict[str, Any]:
    return dict(zip(patterns.paths(tree), jax.tree.leaves(tree), strict=True))


def _json(path: Path, item: str) -> Any:
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path.absolute() / item)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"the {item} of checkpoint {path} cannot be read ({error}); use another one") from error


class Checkpoints:
    """Saves the checkpoints of a workdir, and keeps the `keep_last` newest and `keep_best` of lowest `best_metric`.

    Args:
      workdir: theirs.
      keep_last, keep_best: how many.
      best_metric: a held-out metric.
      milestone: says which steps' newest checkpoint is kept besides, to go back to.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep_last: int,
        keep_best: int,
        best_metric: str,
        milestone: Callable[[int], bool] = lambda step: False,
    ):
        """Removes what interrupted saves have left behind."""
        self._directory = (workdir / layout.CHECKPOINTS).absolute()
        self._keep_last, self._keep_best, self._best_metric = keep_last, keep_best, best_metric
        self._milestone = milestone
        self._first = jax.process_index() == 0
        self._scores: dict[int, float | None] = {}
        for path in finished(workdir):
            # One of the older ones may be damaged: it has no score, and is none of the best.
            with contextlib.suppress(UserError):
                self._scores[int(path.name)] = record(path).score(best_metric)
        if self._first:
            self._directory.mkdir(parents=True, exist_ok=True)
            for path in self._directory.iterdir():
                if path.name.endswith(_DELETED) or _UNFINISHED in path.name:
                    shutil.rmtree(path)
        self._step = 0
        self._failure = self._told = ""
        self._metrics: dict[str, float] = {}
        # Nothing of a save is urgent once it is copied off the devices. The threads that this one starts inherit its
        # priority.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints", initializer=_give_way)
        self._ending: Future[None] | None = None  # of the save that is under way
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

    def save(self, state: Any, record: Record, manifest: dict[str, Any]) -> None:
        """Save in the background; returns once the state is copied off the devices and may be donated.

        A step that is already saved is left as it is. Every process calls this.

        Raises:
          SaveError: the save before it has failed, or, with several processes, this one could not be begun; in all
            processes, where it is so in one. One process says at the next save, or in `confirm`, that it could not.
        """
        begun = time.perf_counter()
        earlier = self._outcome(self._finish)
        self._scores[record.step] = record.score(self._best_metric)
        path = self._directory / str(record.step)
        # Process 0 decides: it may see its own commit of this step before the others see it.
        if not agreement.first(lambda: path in finished(self._directory.parent)):
            alone = jax.process_count() == 1
            items = {
                _STATE: ocp.args.PyTreeSave(_copied(state) if alone else state),
                _RECORD: ocp.args.JsonSave(record.to_json()),
                _MANIFEST: ocp.args.JsonSave(manifest),
            }
            self._step = record.step
            beginning = self._thread.submit(self._checkpointer.save, path, args=ocp.args.Composite(**items))
            # In it several processes meet by collectives, which must not come between those of steps.
            failure = "" if alone else self._outcome(beginning.result)
            self._ending = None if failure else self._thread.submit(self._end, beginning, path, begun)
            earlier = failure or earlier
            self._metrics["checkpoint/blocked_seconds"] = time.perf_counter() - begun
        _raise_in_all(earlier)

    def evaluated(self, record: Record) -> None:
        """Rank the checkpoint of a step that has been evaluated after it was saved, and delete what may go."""
        self._scores[record.step] = record.score(self._best_metric)
        if self._first:
            try:
                evaluations.write(self._directory.parent, record)
            except OSError as error:
                self._failure = f"the evaluation of step {record.step} could not be saved ({error})"
            self._thread.submit(self._prune)

    def confirm(self) -> None:
        """Wait for the save that is under way, if one is. Every process calls this.

        Raises:
          SaveError: it has failed; in all processes, where it has in one.
        """
        _raise_in_all(self._outcome(self._finish))

    def metrics(self) -> dict[str, float]:
        """Of the newest save: seconds that training stood still, seconds in all and bytes, as far as they are known.

        And what `note_restored` was told.
        """
        return dict(self._metrics)

    def note_restored(self, path: Path, seconds: float) -> None:
        """Report also that a checkpoint was restored, and how long that took."""
        self._metrics["checkpoint/restore_seconds"] = seconds
        self._metrics["checkpoint/restore_bytes"] = float(integrity.size(path))

    def complaint(self) -> str | None:
        """That a save has failed in this process, before the others know of it at the next one; otherwise None."""
        self._failure = self._outcome(self._check) or self._failure
        told, self._told = self._failure != self._told, self._failure
        return f"warning: {self._failure}" if told and self._failure else None

    def close(self) -> None:
        """End. A save that is under way is waited for, but not vouched for: see `confirm`."""
        self._outcome(self._finish)
        self._checkpointer.close()
        self._thread.shutdown()

    def _finish(self) -> None:
        ending, self._ending = self._ending, None
        if ending is not None:
            ending.result()

    def _check(self) -> None:
        if self._ending is not None and self._ending.done():
            self._finish()

    def _outcome(self, action: Callable[[], None]) -> str:
        """Why an action of the checkpointer or the save before it has failed, "" if neither has."""
        failure, self._failure = self._failure, ""
        try:
            action()
        except _STORAGE_ERRORS as error:
            steps = [int(path.name) for path in finished(self._directory.parent)]
            rest = f"the newest whole one is of step {steps[-1]}" if steps else "there is none before it"
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            failure = f"the checkpoint of step {self._step} could not be saved in {self._directory} ({reason}); {rest}"
        return failure

    def _end(self, beginning: Future[None], path: Path, begun: float) -> None:
        """Wait, in the background, until Orbax has committed a save; process 0 then makes it a checkpoint of ours."""
        beginning.result()
        self._checkpointer.wait_until_finished()
        if self._first:
            size = integrity.seal(path)
            self._metrics["checkpoint/seconds"] = time.perf_counter() - begun
            self._metrics["checkpoint/bytes"] = float(size)
            self._prune()

    def _prune(self) -> None:
        prune(self._directory.parent, self._kept([int(path.name) for path in finished(self._directory.parent)]))

    def _kept(self, steps: Iterable[int]) -> set[int]:
        steps = sorted(steps)
        scored = [(score, step) for step in steps if (score := self._scores.get(step)) is not None]
        best = [step for _, step in sorted(scored)[: self._keep_best]]
        wanted = [step for step in steps if self._milestone(step)][-1:]
        return {*steps[max(len(steps) - self._keep_last, 0) :], *best, *wanted}


def prune(workdir: Path, keep: set[int]) -> list[Path]:
    """Delete a workdir's checkpoints, those of the steps in `keep` left out; returns what is gone.

    A checkpoint is renamed before its files go: whoever looks sees all of it or nothing.
    """
    gone = [path for path in finished(workdir) if int(path.name) not in keep]
    for path in gone:
        doomed = path.with_name(f"{path.name}{_DELETED}")
        path.rename(doomed)
        shutil.rmtree(doomed)
    return gone


def _give_way() -> None:
    """Give this thread a tenth of the weight of others. Linux has priorities of threads; elsewhere nothing changes.

    With less, other programs on a busy machine hold up saves for minutes, and steps with them, which wait for Python's
    lock while the thread that has it gets no core.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _copied(state: Any) -> Any:
    """What is in the host's memory when this returns, whatever becomes of the state."""
    shardings = jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), state)
    return jax.block_until_ready(jax.device_put(state, shardings, may_alias=False))


def _raise_in_all(failure: str) -> None:
    failures = [text for text in agreement.gather(failure) if text]
    if failures:
        raise SaveError(failures[0])
