"""Make a workdir with a checkpoint of parameters from elsewhere, which `init_from` and other commands read."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ..base.errors import UserError
from ..base.paths import Path
from ..sharding import meshes
from . import ownership, store, takeover
from .folders import Folder
from .record import Ranking, Record
from .saving import Checkpoints, SaveError


def run(source: Path, workdir: Path, task: Any, config: Any) -> tuple[Path, int]:
    """Write parameters and model state of a folder, float32, as the checkpoint of step 0 of a new workdir.

    The memory of the host holds all parameters twice. `init_from` of a folder needs no such memory.

    Args:
      source: the folder.
      workdir: must have no checkpoint.
      task: the model.
      config: the config to write into the workdir.

    Returns:
      The checkpoint, and its number of parameters.

    Raises:
      UserError: the folder cannot be read, or the workdir has a checkpoint or cannot be written.
    """
    folder = Folder.open(source, task)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    replicated = meshes.replicated(mesh)
    specs = {
        name: jax.ShapeDtypeStruct(array.shape, jnp.float32, sharding=replicated)
        for name, array in folder.arrays().items()
    }
    manifest = takeover.describe(optax.identity(), "", nested(specs)["params"], mesh.shape)
    path = write(workdir, config, lambda: nested(folder.read(specs)), manifest)
    return path, sum(math.prod(spec.shape) for name, spec in specs.items() if not name.startswith(store.MODEL))


def write(workdir: Path, config: Any, variables: Callable[[], dict[str, Any]], manifest: dict[str, Any]) -> Path:
    """Write variables as the checkpoint of step 0 of a new workdir, and return the checkpoint.

    Raises:
      UserError: the workdir has a checkpoint or cannot be written.
    """
    if found := store.checkpoints(workdir):
        raise UserError(f"--workdir={workdir}: has the checkpoint {found[-1]}. Give a new one.")
    with ownership.hold(workdir):
        state = {"step": jnp.zeros((), jnp.int32), **variables()}
        ownership.claim(workdir, config)
        saver = Checkpoints(workdir, keep_last=1, keep_best=0, ranking=Ranking())
        try:
            saver.save(state, Record(), manifest)
            saver.confirm()
        except SaveError as error:
            raise UserError(str(error)) from error
        finally:
            saver.close()
    return store.checkpoints(workdir)[0]


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Return a nested dict of values by path."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, last = path.split("/")
        inside = tree
        for name in folders:
            inside = inside.setdefault(name, {})
        inside[last] = value
    return tree
