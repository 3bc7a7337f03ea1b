"""Find and read the checkpoints of a workdir.

A checkpoint is a directory named by its step, which `shelf` lists. It holds the arrays (`state`), what the host knew
(`record`), a description of the arrays (`manifest`), the checksums of these files, and once its step has been evaluated
`evaluation.json`.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from ...optimizers.plan import patterns
from ..base import paths
from ..base import workdir as layout
from ..base.errors import UserError, first_line
from ..base.json_files import read_object
from ..base.paths import Path
from . import verify, workarounds
from .record import Ranking, Record
from .shelf import checkpoints

STATE, RECORD, MANIFEST = "state", "record", "manifest"
FORMAT = 1  # of the manifest
# Arrays are named by their paths in the train state, which begin so.
PARAMS, FROZEN, MODEL, OPTIMIZER, AVERAGING = "params/", "frozen/", "model_state/", "opt_state/", "averaging/"

Damaged = list[tuple[Path, str]]  # checkpoints, each with its first fault
Part = tuple[tuple[slice, ...], np.ndarray]  # a part of an array: its place, and the values


@dataclasses.dataclass(frozen=True)
class Array:
    """Shape and dtype of a saved array."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def bytes(self) -> int:
        """Its size in memory."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def __str__(self):
        return f"{np.dtype(self.dtype).name}[{','.join(map(str, self.shape))}]"


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a checkpoint and not a workdir, which may have a number for its name, too."""
    named = path.name.isdecimal() and paths.of(path).parent.name in (layout.CHECKPOINTS, layout.DAMAGED)
    return path.is_dir() and (named or (path / MANIFEST).is_dir())


def in_workdir(workdir: Path) -> list[Path]:
    """Return the checkpoints of a workdir, oldest first.

    Raises:
      UserError: it has none.
    """
    if found := checkpoints(workdir):
        return found
    given = "has no checkpoint" if workdir.is_dir() else "is not a directory"
    raise UserError(f"{workdir} {given}; give the workdir of a training run, or WORKDIR/{layout.CHECKPOINTS}/STEP")


def locate(path: Path, *, best: bool = False) -> tuple[Path, Damaged]:
    """Return the intact checkpoint that a path names.

    Args:
      path: WORKDIR/checkpoints/STEP or a copy of it, or a workdir, which stands for its newest intact checkpoint.
      best: whether the best by the run's metric is preferred to the newest one.

    Returns:
      The checkpoint, and damaged ones that were preferred to it.

    Raises:
      UserError: no checkpoint is intact.
    """
    found = [path] if is_checkpoint(path) else in_workdir(path)[::-1]
    if best and len(found) > 1:
        order = ranks(path, ranking(path))
        found.sort(key=lambda each: math.inf if (rank := order[each]) is None else rank)
    return first_intact(str(path), found, faults)


def first_intact(place: str, candidates: Iterable[Path], faults: Callable[[Path], list[str]]) -> tuple[Path, Damaged]:
    """Return the first checkpoint without faults, and those before it.

    Raises:
      UserError: every candidate has faults, or there are no candidates.
    """
    damaged: Damaged = []
    for path in candidates:
        found = faults(path)
        if not found:
            return path, damaged
        damaged.append((path, found[0]))
    reasons = "; ".join(f"{path.name}: {why}" for path, why in damaged)
    raise UserError(
        f"every checkpoint of {place} is damaged ({reasons}); restore one from a backup, or use another workdir"
    )


def faults(path: Path, sums: verify.Sums | None = None, *, part: int = 0, parts: int = 1) -> list[str]:
    """Return what is wrong with a checkpoint's files, one text each.

    Files are compared with their checksums. If these are incomplete, all arrays are read instead.

    Args:
      path: the checkpoint.
      sums: its checksums, if they have been read.
      part: the share of this reader, of `parts` readers of the same checkpoint.
      parts: number of readers.
    """
    sums = sums or verify.read(path)
    names = list(sums.digests)[part::parts]
    found = sums.faults + verify.mismatches(path, {name: sums.digests[name] for name in names})
    if not (found or sums.complete):
        try:
            record(path)
            _json(path, MANIFEST)
            for name in sorted(arrays(path))[part::parts]:
                read(path, {name: None})
        except UserError as error:
            found.append(str(error))
    return found


def record(path: Path) -> Record:
    """Return the record of a checkpoint, with the evaluation of its step if that was finished.

    Raises:
      UserError: it cannot be read, or is of another step than its directory.
    """
    content = _json(path, RECORD)
    try:
        found = Record.from_json(content)
        # Without a valid evaluation, the step is evaluated again.
        with contextlib.suppress(UserError, ValueError, LookupError):
            evaluation = read_object(path / verify.EVALUATION) or {}
            found = Record.from_json(content | {key: evaluation[key] for key in ("last", "best")})
    except ValueError as error:
        raise UserError(f"checkpoint {path}: {error}; use another one") from error
    if path.parent.name == layout.CHECKPOINTS and path.name.isdecimal() and int(path.name) != found.step:
        raise UserError(f"checkpoint {path}: its record is of step {found.step}; use another one")
    return found


def write_evaluation(path: Path, record: Record) -> None:
    """Write the evaluation of a checkpoint that was saved before its step was evaluated."""
    content = {key: value for key, value in dataclasses.asdict(record).items() if key in ("last", "best")}
    paths.write_text(path / verify.EVALUATION, json.dumps(content) + "\n")


def ranking(workdir: Path) -> Ranking:
    """Return the metric by which a workdir's config ranks checkpoints; the lowest loss if there is no config.

    Raises:
      UserError: the config cannot be read or names no metric.
    """
    content = read_object(workdir / layout.CONFIG)
    if content is None:
        return Ranking()
    try:
        section = content["evaluation"]
        return Ranking.of(section["best_metric"], section["best_mode"])
    except (LookupError, TypeError, AttributeError, UserError) as error:
        raise UserError(
            f"{workdir / layout.CONFIG} has no valid evaluation.best_metric and best_mode; restore it"
        ) from error


def ranks(workdir: Path, ranking: Ranking) -> dict[Path, float | None]:
    """Return the rank of each checkpoint of a workdir; a damaged one has none."""
    found: dict[Path, float | None] = {}
    for path in checkpoints(workdir):
        try:
            found[path] = record(path).rank(ranking)
        except UserError:
            found[path] = None
    return found


def manifest(path: Path) -> dict[str, Any]:
    """Return the description of a checkpoint's arrays, which `takeover.describe` has made. Its parts are not checked.

    Raises:
      UserError: it cannot be read, or has another format.
    """
    content = _json(path, MANIFEST)
    if content.get("format") != FORMAT:
        raise UserError(f"checkpoint {path}: its manifest has the format {content.get('format')!r:.50}, not {FORMAT}")
    return content


def arrays(path: Path) -> dict[str, Array]:
    """Return shape and dtype of every array by its path in the train state, without reading the arrays.

    Raises:
      UserError: the checkpoint cannot be read.
    """
    with _readable(path):
        return {name: Array(tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in by_name(_tree(path)).items()}


def read(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Read some arrays of a checkpoint.

    Args:
      path: the checkpoint.
      wanted: name -> ShapeDtypeStruct with a sharding for an array on the devices, None for a NumPy array. Shapes must
        be those of `arrays`.

    Raises:
      UserError: the arrays cannot be read.
    """
    if not wanted:
        return {}

    def restore_args(name: str) -> Any:
        like = wanted.get(name)
        if like is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=like.sharding, global_shape=like.shape, dtype=like.dtype)

    with _readable(path):
        tree = _tree(path)
        names, structure = patterns.paths(tree), jax.tree.structure(tree)
        items = jax.tree.unflatten(structure, [0 if name in wanted else ocp.PLACEHOLDER for name in names])
        args = ocp.args.PyTreeRestore(items, restore_args=jax.tree.unflatten(structure, map(restore_args, names)))
        # The handler has no barriers of its own, so processes may read different arrays.
        restored = ocp.PyTreeCheckpointHandler().restore(paths.of(path) / STATE, args=args)
    return {name: value for name, value in by_name(restored).items() if name in wanted}


def parts(path: Path) -> Callable[[str], Iterator[Part]]:
    """Return a function that yields an array in the parts in which it was saved, the shards of the devices.

    The metadata of the checkpoint are read once.

    Raises:
      UserError: the checkpoint cannot be read; when the function is called, the array cannot be read.
    """
    with _readable(path):
        saved = by_name(_tree(path))
        # Orbax reads whole arrays only.
        base = workarounds.kvstore(f"{paths.of(path) / STATE}/")

    def of_array(name: str) -> Iterator[Part]:
        with _readable(path):
            store = {"driver": "ocdbt", "base": base, "path": f"{saved[name].name}/"}
            opened = tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()
            sizes: Any = opened.chunk_layout.read_chunk.shape or opened.shape
            for starts in itertools.product(*(range(0, n, size) for n, size in zip(opened.shape, sizes, strict=True))):
                ends = map(min, opened.shape, map(operator.add, starts, sizes))
                place = tuple(map(slice, starts, ends))
                yield place, np.asarray(opened[place].read().result())

    return of_array


def by_name(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their paths."""
    return dict(zip(patterns.paths(tree), jax.tree.leaves(tree), strict=True))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    workarounds.reach_buckets()
    try:
        yield
    except Exception as error:  # damaged metadata raise any of a dozen errors in Orbax, TensorStore and NumPy
        reason = f"{type(error).__name__} {first_line(error):.200}"
        raise UserError(f"the arrays of checkpoint {path} cannot be read ({reason}); use another one") from error


def _tree(path: Path) -> Any:
    return ocp.PyTreeCheckpointHandler().metadata(paths.of(path) / STATE).tree


def _json(path: Path, item: str) -> dict[str, Any]:
    content = read_object(path / item / "metadata")
    if content is None:
        raise UserError(f"checkpoint {path} has no {item}; use another one")
    return content
