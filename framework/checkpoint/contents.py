"""What a checkpoint says of itself, its parts checked against each other. Nothing is put on a device or executed."""

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np

from ...optimizers.checkpoint.manifest import SavedBlocks
from ..base import workdir as layout
from ..base.errors import UserError
from . import integrity, store
from .manifest import Manifest
from .record import Record
from .store import Array

OPTIMIZER, PARAMS, MODEL, AVERAGING = "opt_state/", "params/", "model_state/", "averaging/"


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a checkpoint says of itself.

    Attributes:
      path: the checkpoint.
      record: what the host knew.
      manifest: what describes the arrays.
      arrays: shape and type of each, by its path in the train state.
      blocks: where the optimizer's blocks lie; None for an optimizer without blocks.
    """

    path: Path
    record: Record
    manifest: Manifest
    arrays: dict[str, Array]
    blocks: SavedBlocks | None

    @functools.cached_property
    def devices(self) -> int:
        """Number of devices of the run that has saved it."""
        return math.prod(self.manifest.mesh.values())


def locate(text: str | Path, *, whole: bool) -> tuple[Path, list[tuple[Path, str]]]:
    """The checkpoint that a person means: one, or the newest whole one of a workdir.

    Args:
      text: a workdir, or WORKDIR/checkpoints/STEP, or a copy of such a directory.
      whole: whether one that is given itself must be whole, too: every file of it is then read.

    Returns:
      The checkpoint, and newer ones of the workdir that are damaged, each with its first fault.

    Raises:
      UserError: there is none.
    """
    path = Path(text).expanduser()
    one = is_one(path)
    if one and not whole:
        return path, []
    damaged = []
    for found in [path] if one else reversed(in_workdir(path)):
        faults = integrity.faults(found)
        if not faults:
            return found, damaged
        damaged.append((found, faults[0]))
    if one:
        raise UserError(f"checkpoint {path} is damaged ({damaged[0][1]}); use another one")
    reasons = "; ".join(f"{found.name}: {why}" for found, why in damaged)
    raise UserError(f"no checkpoint of {path} is whole ({reasons}); restore one from a backup")


def is_one(path: Path) -> bool:
    """Whether a path is a checkpoint, whole or not, and no workdir, which may have a number for its name, too."""
    numbered = path.name.isdecimal() and path.absolute().parent.name in (layout.CHECKPOINTS, layout.DAMAGED)
    return path.is_dir() and (numbered or integrity.is_sealed(path))


def in_workdir(workdir: Path) -> list[Path]:
    """The finished checkpoints of a workdir, oldest first.

    Raises:
      UserError: it has none.
    """
    if not workdir.is_dir():
        raise UserError(f"{workdir} is no directory; give a workdir or WORKDIR/{layout.CHECKPOINTS}/STEP")
    found = store.finished(workdir)
    if not found:
        raise UserError(
            f"{workdir} holds no finished checkpoint; give the --workdir of a training run or "
            f"WORKDIR/{layout.CHECKPOINTS}/STEP"
        )
    return found


def read(path: Path) -> Contents:
    """What a checkpoint says of itself.

    Raises:
      UserError: some of it cannot be read, or contradicts the rest.
    """
    contents = parse(path)
    if found := contradictions(contents):
        raise UserError(f"checkpoint {path} contradicts itself ({found[0]}); use another one")
    return contents


def parse(path: Path) -> Contents:
    """Like `read`, without a look at how the parts agree."""
    record, content, arrays = store.record(path), store.manifest(path), store.arrays(path)
    shapes = {name.removeprefix(OPTIMIZER): x.shape for name, x in arrays.items() if name.startswith(OPTIMIZER)}
    try:
        manifest = Manifest.from_json(content)
        # By what it looks like: the optimizer's name may be that of code that is not here, and none of it is to be run.
        has_blocks = "buckets" in manifest.state or any(
            name.startswith("buckets/") and name.endswith("/block") for name in shapes
        )
        blocks = SavedBlocks.read(manifest.state, shapes) if has_blocks else None
    except ValueError as error:
        raise UserError(f"the manifest of checkpoint {path} is damaged ({error}); use another one") from error
    return Contents(path, record, manifest, arrays, blocks)


def contradictions(contents: Contents) -> list[str]:
    """Where the parts of a checkpoint do not agree, one short text each; no array is read."""
    manifest, arrays, blocks = contents.manifest, contents.arrays, contents.blocks
    found = []
    for path, parameter in manifest.parameters.items():
        there = arrays.get(f"{PARAMS}{path}")
        wanted = f"{parameter.dtype}[{','.join(map(str, parameter.shape))}]"
        if there is None:
            found.append(f"{PARAMS}{path} is missing, the manifest has it as {wanted}")
        elif str(there) != wanted:
            found.append(f"{PARAMS}{path} is {there}, the manifest has it as {wanted}")
    for name in arrays:
        if name.startswith(PARAMS) and name.removeprefix(PARAMS) not in manifest.parameters:
            found.append(f"{name} is not in the manifest")
    if "step" not in arrays:
        found.append("step is missing")
    numbered = contents.path.name.isdecimal() and contents.path.absolute().parent.name == layout.CHECKPOINTS
    if numbered and int(contents.path.name) != contents.record.step:
        found.append(f"the record is of step {contents.record.step}, the directory of step {contents.path.name}")
    if blocks is not None:
        shapes = {path: blocks.buckets[name].blocks[path].view.shape for path, name in blocks.bucket_of.items()}
        shapes |= {path: entry["shape"] for path, entry in blocks.diagonal.items()}
        for path in sorted(shapes.keys() | manifest.parameters.keys()):
            if path not in manifest.parameters:
                found.append(f"the optimizer has state of {path}, which is no parameter")
            elif path not in shapes:
                found.append(f"the optimizer has no state of {path}")
            elif shapes[path] != manifest.parameters[path].shape:
                there, here = (list(shape) for shape in (shapes[path], manifest.parameters[path].shape))
                found.append(f"the optimizer has {path} with the shape {there}, the manifest with {here}")
        for name, bucket in blocks.buckets.items():
            if len(bucket.slots) % contents.devices:
                found.append(f"bucket {name} has {len(bucket.slots)} slots for {contents.devices} devices")
    return found


def mismatches(contents: Contents) -> list[str]:
    """Where small arrays do not hold what the record and the manifest say: the step, and the block in each slot.

    Raises:
      UserError: they cannot be read.
    """
    expected = {"step": np.array(contents.record.step)}
    if contents.blocks is not None:
        expected |= {
            f"{OPTIMIZER}buckets/{name}/block": bucket.slots for name, bucket in contents.blocks.buckets.items()
        }
    arrays = store.read(contents.path, dict.fromkeys(expected))
    return [
        f"{name} is not what the {'record' if name == 'step' else 'manifest'} says"
        for name, values in expected.items()
        if not np.array_equal(arrays[name], values)
    ]


def faults(path: Path) -> list[str]:
    """All that is wrong with a checkpoint, one short text each: its files, else what they hold."""
    found = integrity.faults(path)
    if found:
        return found
    try:
        contents = parse(path)
        return contradictions(contents) or mismatches(contents)
    except UserError as error:
        return [str(error)]
