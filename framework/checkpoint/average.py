"""Average the parameters of several checkpoints, as the checkpoint of a new workdir."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ..base import paths
from ..base import workdir as layout
from ..base.errors import UserError
from ..base.json_files import read_object
from ..base.paths import Path
from ..sharding import meshes
from . import imports, store, takeover
from .store import FROZEN, MODEL, PARAMS


def newest(given: Sequence[Path], last: int) -> list[Path]:
    """Return the checkpoints to average: of a workdir the newest `last`, oldest first.

    Raises:
      UserError: a workdir has fewer, one of them is damaged, or there is only one checkpoint in all.
    """
    found: list[Path] = []
    for path in given:
        there = [path] if store.is_checkpoint(path) else store.in_workdir(path)[-last:]
        if len(there) < last and not store.is_checkpoint(path):
            raise UserError(
                f"--last={last}: {path} has {len(there)} checkpoints. Use --last={len(there)}, or train with "
                f"--config.checkpoint.keep_last={last}."
            )
        found += there
    if len(found) < 2:
        raise UserError(f"--last={last}: {found[0]} is the only checkpoint. Give several, or a larger --last.")
    for path in found:
        if faults := store.faults(path):
            raise UserError(f"checkpoint {path} is damaged ({faults[0]}). Give others.")
    return found


def run(checkpoints: Sequence[Path], workdir: Path) -> tuple[Path, int]:
    """Write the mean of the parameters of checkpoints as the checkpoint of step 0 of a new workdir.

    Sums are float32, and each parameter keeps its dtype. Frozen parameters and model state, such as batch statistics,
    are those of the last checkpoint, config and tokenizer those of its run. The memory of the host holds all parameters
    twice.

    Returns:
      The checkpoint, and its number of parameters.

    Raises:
      UserError: the checkpoints have different parameters, or the workdir has a checkpoint or cannot be written.
    """
    shapes = [{k: v.shape for k, v in store.arrays(path).items() if k.startswith(PARAMS)} for path in checkpoints]
    for path, each in zip(checkpoints, shapes, strict=True):
        if each != shapes[0]:
            unlike = min(k for k in {*each, *shapes[0]} if each.get(k) != shapes[0].get(k)).removeprefix(PARAMS)
            raise UserError(f"checkpoints {checkpoints[0]} and {path} differ in {unlike}. Average runs of one model.")
    others = [name for name in store.arrays(checkpoints[-1]) if name.startswith((FROZEN, MODEL))]
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))

    def variables() -> dict[str, Any]:
        flat = {name: _mean(checkpoints, name) for name in shapes[0]}
        flat |= {name: store.read(checkpoints[-1], {name: None})[name] for name in others}
        return imports.nested({name: jax.device_put(x, meshes.replicated(mesh)) for name, x in flat.items()})

    specs = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=meshes.replicated(mesh))
        for name, array in store.arrays(checkpoints[-1]).items()
        if name in shapes[0]
    }
    origin = paths.of(checkpoints[-1]).parent.parent
    config = ConfigDict(read_object(origin / layout.CONFIG) or {})  # nothing that it names is imported
    manifest = takeover.describe(optax.identity(), "", imports.nested(specs)[PARAMS.strip("/")], mesh.shape)
    path = imports.write(workdir, config, variables, manifest)
    for tokenizer in paths.listed(origin / layout.CACHE):
        if tokenizer.match("tokenizer-*.json"):
            paths.write_text(workdir / layout.CACHE / tokenizer.name, tokenizer.read_text())
    return path, sum(map(math.prod, shapes[0].values()))


def _mean(checkpoints: Sequence[Path], name: str) -> np.ndarray:
    first = store.read(checkpoints[0], {name: None})[name]
    total = np.asarray(first, np.float32).copy()
    for path in checkpoints[1:]:
        total += np.asarray(store.read(path, {name: None})[name], np.float32)
    return (total / np.float32(len(checkpoints))).astype(first.dtype)
