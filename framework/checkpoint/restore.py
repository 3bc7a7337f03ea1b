"""Read a trained model from a workdir for use: its components from the run's config, its variables onto a mesh.

The optimizer's state is not read, and the mesh may differ from that of the run.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from ..base import workdir as layout
from ..base.errors import UserError
from ..base.json_files import read_object
from ..base.model_folder import is_folder
from ..base.paths import Path
from ..config import check, components, overrides, schema
from ..sharding import placement
from ..step.state import abstract_variables
from ..task import BatchSpec, Task
from . import store
from .folders import Folder
from .store import FROZEN, MODEL, PARAMS

_PACKAGE = __name__.partition(".")[0]


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
    return components.build(components.component(**found))  # knobs that were declared later have their defaults


def config(workdir: Path, changes: Sequence[str] = (), *, trusted: bool = False) -> Any:
    """Return the locked and checked config of a workdir's run, with `changes` applied.

    Args:
      workdir: the workdir.
      changes: as `overrides.apply` takes them.
      trusted: whether components from outside this package may be imported; a workdir may come from anywhere.

    Raises:
      UserError: the config is missing or not that of a run, a component may not be imported, or a change is invalid.
    """
    stored = read_object(workdir / layout.CONFIG)
    if stored is None:
        raise UserError(f"{workdir} has no {layout.CONFIG}. Give the workdir of a training run.")
    found: Any = schema.get_config()
    with found.unlocked():
        for section in components.CONTRACTS:
            given = stored.pop(section, None)
            if not isinstance(given, dict) or not isinstance(given.get("name"), str):
                raise UserError(f"{workdir / layout.CONFIG} has no section {section!r}. Give the workdir of a run.")
            if not trusted and not given["name"].startswith(f"{_PACKAGE}."):
                raise UserError(
                    f"{workdir}: config.{section}.name={given['name']!r} is code from elsewhere. Add --trust."
                )
            found[section] = components.component(**given)
    declared = dict(overrides.flat(found))
    # A knob that is no longer declared does not matter.
    kept = [f"{key}={value!r}" for key, value in overrides.flat(stored) if key in declared]
    overrides.apply(found, [*kept, *changes])
    check.check(found)
    return found


def variables(
    checkpoint: Path, task: Task, batch_spec: BatchSpec, rules: placement.Rules, mesh: Mesh
) -> dict[str, Any]:
    """Read the variables of a checkpoint, or of a Hugging Face folder, onto a mesh.

    Args:
      checkpoint: an intact checkpoint, or a folder.
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
    folder = Folder.open(checkpoint, task) if is_folder(checkpoint) else None
    there, wanted = folder.arrays() if folder else store.arrays(checkpoint), {}
    for (path, leaf), sharding in zip(store.by_name(abstract).items(), specs, strict=True):
        name = path if path.startswith((PARAMS, FROZEN)) else f"{MODEL}{path}"
        here = store.Array(tuple(leaf.shape), there[name].dtype if folder and name in there else leaf.dtype)
        if there.get(name) != here:
            raise UserError(
                f"checkpoint {checkpoint} has {name} as {there.get(name, 'nothing')}, the model as {here}. "
                "Use a checkpoint of this model."
            )
        wanted[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    arrays = folder.read(wanted) if folder else store.read(checkpoint, wanted)
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])
