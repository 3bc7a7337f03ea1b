"""Read a trained model from a workdir for use: its components from the run's config, its variables onto a mesh.

The optimizer's state is not read, and the mesh may differ from that of the run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ..base import workdir as layout
from ..base.errors import UserError
from ..base.json_files import read_object
from ..config import components
from ..sharding import placement
from ..step.state import abstract_variables
from ..task import BatchSpec, Task
from . import store
from .store import MODEL, PARAMS


def component(workdir: Path, section: str, allowed: Sequence[str]) -> Any:
    """Build the task, data or optimizer of a workdir's run.

    Args:
      workdir: the workdir.
      section: "task", "data" or "optimizer".
      allowed: import strings that it may have. Others are not imported: importing executes code, and a workdir may
        come from anywhere.

    Raises:
      UserError: the workdir has no such section, another component, or fields that its class refuses.
    """
    config = read_object(workdir / layout.CONFIG)
    found = (config or {}).get(section)
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise UserError(f"{workdir / layout.CONFIG} has no section {section!r}. Give the workdir of a training run.")
    if found["name"] not in allowed:
        raise UserError(f"{workdir}: config.{section}.name={found['name']!r} must be {' or '.join(allowed)}.")
    return components.build(ConfigDict(found))


def variables(
    checkpoint: Path, task: Task, batch_spec: BatchSpec, rules: placement.Rules, mesh: Mesh
) -> dict[str, Any]:
    """Read the variables of a checkpoint onto a mesh.

    Args:
      checkpoint: an intact checkpoint.
      task: the task of the variables.
      batch_spec: shapes and dtypes of a batch.
      rules: (logical name, mesh axis | axes | None); the first rule with a name decides.
      mesh: the mesh.

    Raises:
      UserError: the checkpoint cannot be read, or its variables differ from those of the task.
    """
    abstract = abstract_variables(task, batch_spec)
    placements = placement.place_all(abstract, task.logical_axes(abstract), rules, mesh)
    specs = jax.tree.leaves(placement.shardings(abstract, placements, mesh))
    there, wanted = store.arrays(checkpoint), {}
    for (path, leaf), sharding in zip(store.by_name(abstract).items(), specs, strict=True):
        name = path if path.startswith(PARAMS) else f"{MODEL}{path}"
        here = store.Array(tuple(leaf.shape), leaf.dtype)
        if there.get(name) != here:
            raise UserError(
                f"checkpoint {checkpoint} has {name} as {there.get(name, 'nothing')}, the model as {here}. "
                "Use a checkpoint of this model."
            )
        wanted[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    arrays = store.read(checkpoint, wanted)
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])
