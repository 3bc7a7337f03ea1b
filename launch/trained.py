"""Find the model that a flag names, with its checkpoint, its data set and a mesh; read it onto the mesh."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..configs import base
from ..framework import dataset
from ..framework.base import model_folder, paths
from ..framework.base import workdir as layout
from ..framework.base.errors import UserError, printable
from ..framework.checkpoint import restore, store
from ..framework.config import components
from ..framework.sharding import global_batch, meshes
from ..framework.step import compilation_cache
from ..models.lm import LMTask

LM, TEXT = "shampax.models.lm:LMTask", "shampax.framework.data.text:TextData"
CHAT = "shampax.framework.data.text.chat:ChatData"


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model, not yet read.

    Attributes:
      workdir: of its run.
      checkpoint: an intact one.
      task: the model.
      data: its data set.
      mesh: all devices of this machine.
    """

    workdir: paths.Path
    checkpoint: paths.Path
    task: Any
    data: Any
    mesh: Any

    def codec(self) -> dataset.Codec:
        """Return the codec of its texts.

        Raises:
          UserError: it has none, or its tokenizer is missing or invalid.
        """
        if self.checkpoint == self.workdir and not self.data.tokenizer:
            raise UserError(f"{self.workdir} has no tokenizer.json or tokenizer.model. Copy the model's into it.")
        found = dataset.codec(self.data, layout.cache(self.workdir))
        if found is None:
            raise UserError(f"{self.workdir}: its data are not text. Give the workdir of a language model.")
        return found

    def variables(self) -> dict[str, Any]:
        """Read its variables onto the mesh."""
        import jax

        with jax.set_mesh(self.mesh):
            spec = global_batch.spec(self.data.spec(), self.mesh.size, self.mesh)
            return restore.variables(self.checkpoint, self.task, spec, base.get_config().sharding_rules, self.mesh)


def find(path: paths.Path, use: str, mesh: str, tasks: Sequence[str], data: Sequence[str]) -> Trained:
    """Return the model of a workdir, of one of its checkpoints, or of a Hugging Face folder.

    Args:
      path: the workdir, WORKDIR/checkpoints/STEP, or the folder.
      use: which checkpoint of a workdir: "best" or "newest".
      mesh: sizes of mesh axes, "data=2,tensor=4"; "" has all devices along data.
      tasks: import strings of the tasks that it may have; others are not imported.
      data: import strings of the data sets that it may have.

    Raises:
      UserError: there is no such model, or the mesh does not fit the devices.
    """
    devices = make_mesh(mesh)
    if model_folder.is_folder(path):
        config = config_of_folder(Path(path))
        return Trained(path, path, components.build(config.task), components.build(config.data), devices)
    workdir, checkpoint = locate(path, use)
    task = adapted(restore.component(workdir, "task", tasks))
    return Trained(workdir, checkpoint, task, restore.component(workdir, "data", data), devices)


def config_of_folder(folder: Path) -> Any:
    """Return a config that trains the model of a Hugging Face folder, with its tokenizer if it has one.

    Raises:
      UserError: the folder is not of a model that shampax has.
    """
    config = base.get_config()
    try:
        given = model_folder.read_config(folder), model_folder.read_adapter(folder)
        config.task = base.component(LM, **LMTask.knobs_of_folder(*given))
    except ValueError as error:
        raise UserError(f"{folder}: {error}.") from error
    places = folder, model_folder.base_of(folder)
    words = [path for path in places for name in ("tokenizer.json", "tokenizer.model") if (path / name).exists()]
    tokenizer = {"tokenizer": str(words[0].absolute())} if words else {}
    config.data = base.component(TEXT, vocab_size=config.task.get_ref("vocab_size"), **tokenizer)
    return config


def locate(path: paths.Path, use: str) -> tuple[paths.Path, paths.Path]:
    """Return a workdir and an intact checkpoint of it, given one of both; "best" or "newest" chooses from a workdir.

    Raises:
      UserError: the path is neither, or no checkpoint is intact.
    """
    checkpoint, damaged = store.locate(path, best=use == "best")
    for each, why in damaged:
        warn(f"checkpoint {each} is damaged ({why}); using {checkpoint}")
    return paths.of(path).parent.parent if store.is_checkpoint(path) else path, checkpoint


def adapted(task: Any) -> Any:
    """Return a task for the devices here, which may lack the kernel of attention that training named."""
    return dataclasses.replace(task, attention="auto") if hasattr(task, "attention") else task


def compiled_before(workdir: paths.Path) -> contextlib.AbstractContextManager[None]:
    """Use and keep compiled programs beside the workdir, where that can be written."""
    if paths.is_local(workdir) and not os.access(paths.of(workdir).parent, os.W_OK):
        return contextlib.nullcontext()
    return compilation_cache.kept(paths.of(workdir), base.get_config().compilation_cache)


def make_mesh(text: str) -> Any:
    """Return the mesh of all devices that a flag describes."""
    sizes = dict(base.get_config().mesh)
    for each in filter(None, text.split(",")):
        axis, _, size = each.partition("=")
        if axis not in ("data", "fsdp", "tensor") or not size.isdecimal() or not int(size):
            raise UserError(f"--mesh={text}: {each!r} is not one of data=N, fsdp=N, tensor=N with N from 1.")
        sizes[axis] = int(size)
    return meshes.make_mesh(sizes)


def warn(text: str) -> None:
    """Print a line to standard error."""
    print(printable(f"warning: {' '.join(text.split())}"), file=sys.stderr)
