"""Find and read the checkpoints of a workdir.

A checkpoint is a directory named by its step. Orbax writes it under a temporary name and renames it once it is
complete. It holds the arrays (`state`), what the host knew (`record`), a description of the arrays (`manifest`), the
checksums of these files, and once its step has been evaluated `evaluation.json`.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ...optimizers.plan import patterns
from ..base import workdir as layout
from ..base.errors import UserError
from ..base.json_files import read_object
from . import verify
from .record import Ranking, Record

STATE, RECORD, MANIFEST = "state", "record", "manifest"
# Arrays are named by their paths in the train state, which begin so.
PARAMS, MODEL, OPTIMIZER, AVERAGING = "params/", "model_state/", "opt_state/", "averaging/"


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


def checkpoints(workdir: Path) -> list[Path]:
    """Return the committed checkpoints of a workdir, oldest first."""
    directory = workdir / layout.CHECKPOINTS
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a checkpoint and not a workdir, which may have a number for its name, too."""
    named = path.name.isdecimal() and path.absolute().parent.name in (layout.CHECKPOINTS, layout.DAMAGED)
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


def locate(text: str | Path, *, intact: bool) -> tuple[Path, list[tuple[Path, str]]]:
    """Return the checkpoint that a path names: the checkpoint itself, or the newest intact one of a workdir.

    Args:
      text: a workdir, WORKDIR/checkpoints/STEP, or a copy of such a directory.
      intact: whether to verify a checkpoint that is named itself, too.

    Returns:
      The checkpoint, and newer ones of the workdir that are damaged, each with its first fault.

    Raises:
      UserError: no checkpoint is intact.
    """
    path = Path(text).expanduser()
    one = is_checkpoint(path)
    if one and not intact:
        return path, []
    damaged = []
    for found in [path] if one else reversed(in_workdir(path)):
        wrong = faults(found)
        if not wrong:
            return found, damaged
        damaged.append((found, wrong[0]))
    if one:
        raise UserError(f"checkpoint {path} is damaged ({damaged[0][1]}); use another one")
    raise UserError(all_damaged(str(path), damaged))


def all_damaged(place: str, damaged: list[tuple[Path, str]]) -> str:
    """Return the message for a workdir in which every checkpoint is damaged."""
    reasons = "; ".join(f"{path.name}: {why}" for path, why in damaged)
    return f"every checkpoint of {place} is damaged ({reasons}); restore one from a backup, or use another workdir"


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
            manifest(path)
            for name in sorted(arrays(path))[part::parts]:
                read(path, {name: None})
        except UserError as error:
            found.append(str(error))
    return found


def record(path: Path) -> Record:
    """Return the record of a checkpoint, with the evaluation of its step if that was finished.

    Raises:
      UserError: it cannot be read.
    """
    content = _json(path, RECORD)
    evaluation = read_object(path / verify.EVALUATION)
    try:
        return Record.from_json(content | evaluation if evaluation else content)
    except (ValueError, TypeError) as error:
        raise UserError(f"checkpoint {path}: {error}; use another one") from error


def write_evaluation(path: Path, record: Record) -> None:
    """Write the evaluation of a checkpoint that was saved before its step was evaluated."""
    content = record.to_json()
    partial = path / f"{verify.EVALUATION}.partial"
    partial.write_text(json.dumps({"last": content["last"], "best": content["best"]}) + "\n")
    partial.replace(path / verify.EVALUATION)


def ranking(workdir: Path) -> Ranking:
    """Return the metric by which a workdir's config ranks checkpoints; the lowest loss if there is no config.

    Raises:
      UserError: the config cannot be read or names no metric.
    """
    content = read_object(workdir / layout.CONFIG)
    if content is None:
        return Ranking()
    section = content.get("evaluation")
    metric, mode = (section.get(key) if isinstance(section, dict) else None for key in ("best_metric", "best_mode"))
    if not isinstance(metric, str) or mode not in ("min", "max"):
        raise UserError(f"{workdir / layout.CONFIG} has no valid evaluation.best_metric and best_mode; restore it")
    return Ranking(metric, mode)


def manifest(path: Path) -> dict[str, Any]:
    """Return the description of a checkpoint's arrays; see the module `takeover`.

    Raises:
      UserError: it cannot be read.
    """
    content = _json(path, MANIFEST)
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} has no manifest; use another one")
    return content


def arrays(path: Path) -> dict[str, Array]:
    """Return shape and dtype of every array by its path in the train state, without reading the arrays.

    Raises:
      UserError: the checkpoint cannot be read.
    """
    with _readable(path):
        return {name: Array(tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in _by_name(_tree(path)).items()}


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
    # The handler has no barriers of its own, so processes may read different arrays.
    wanted_args = ocp.args.PyTreeRestore(items, restore_args=args)
    restored = ocp.PyTreeCheckpointHandler().restore(_item(path, STATE), args=wanted_args)
    return {name: value for name, value in _by_name(restored).items() if name in wanted}


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damaged metadata raise any of a dozen errors in Orbax, TensorStore and NumPy
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise UserError(
            f"the arrays of checkpoint {path} cannot be read ({type(error).__name__} {reason:.200}); use another one"
        ) from error


def _item(path: Path, name: str) -> Any:
    return epath.Path(path.absolute() / name)


def _tree(path: Path) -> Any:
    return ocp.PyTreeCheckpointHandler().metadata(_item(path, STATE)).tree


def _by_name(tree: Any) -> dict[str, Any]:
    return dict(zip(patterns.paths(tree), jax.tree.leaves(tree), strict=True))


def _json(path: Path, item: str) -> Any:
    try:
        return ocp.JsonCheckpointHandler().restore(_item(path, item))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"the {item} of checkpoint {path} cannot be read ({error}); use another one") from error
