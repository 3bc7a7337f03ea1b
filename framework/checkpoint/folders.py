"""Read the tensors of a Hugging Face folder onto a mesh.

A folder has `config.json` and safetensors files. Files are mapped into memory, and each process copies its share of one
tensor after the other, so that its memory holds about two tensors.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ..base import paths
from ..base.errors import UserError
from ..base.model_folder import CONFIG, base_of, read_adapter, read_config
from ..task import Tensors
from .store import FROZEN, MODEL, PARAMS, Array

TYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
_FEW = 5  # names shown in an error


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
      file: the file.
      array: shape and dtype.
      offset: its first byte.
    """

    file: Path
    array: Array
    offset: int

    def map(self) -> np.ndarray:
        """Return the tensor as a NumPy array; parts are read when they are used."""
        return np.memmap(self.file, self.array.dtype, "r", self.offset, self.array.shape)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A Hugging Face folder whose tensors are the parameters of a task, and its model state.

    Attributes:
      path: the folder.
      tensors: path of an array in a train state -> its tensors. Those of the base of an adapter are frozen.
      stored: name of a tensor -> where it is.
    """

    path: Path
    tensors: Mapping[str, Tensors]
    stored: Mapping[str, Stored]

    @classmethod
    def open(cls, path: paths.Path, task: Any) -> "Folder":
        """Compare a folder with a task. Only `config.json` and the files' headers are read.

        Raises:
          UserError: the task has no such folders, or its parameters are not the folder's tensors.
        """
        path = Path(path)
        config, adapter = read_config(path), read_adapter(path)
        if not hasattr(task, "folder_tensors"):
            raise UserError(f"{path}: {type(task).__name__} reads no Hugging Face folders. Give a workdir.")
        try:
            prefix = FROZEN if adapter else PARAMS
            tensors = {f"{prefix}{name}": each for name, each in task.folder_tensors(config).items()}
            if adapter:
                trained = task.adapter_tensors(config, adapter)
                tensors |= {f"{PARAMS}{name}": each for name, each in trained.items()}
            tensors |= {f"{MODEL}{name}": each for name, each in task.folder_state(config).items()}
        except ValueError as error:
            raise UserError(f"{path}: {error}.") from error
        stored = _headers(base_of(path)) | (_headers(path) if adapter else {})
        wanted = {name: each.shape for each in tensors.values() for _, name in each.names()}
        if missing := [name for name in wanted if name not in stored]:
            raise UserError(f"{path} lacks {_shown(missing)}. Get the complete folder.")
        if others := [name for name in stored if name not in wanted and not task.folder_may_have(name, config)]:
            raise UserError(f"{path} has {_shown(others)}, which the model does not have. Use another folder.")
        for name, shape in wanted.items():
            if stored[name].array.shape != shape:
                has = f"{name} as {stored[name].array}"
                raise UserError(f"{path} has {has}, but its {CONFIG} makes it {list(shape)}. Correct one of them.")
        return cls(path, tensors, stored)

    def arrays(self) -> dict[str, Array]:
        """Return path of each array in a train state -> its shape, and the dtype of its first tensor."""
        return {
            path: Array(each.parameter, self.stored[next(iter(each.names()))[1]].array.dtype)
            for path, each in self.tensors.items()
        }

    def read(self, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Read arrays, in the dtypes wanted.

        Args:
          wanted: path in a train state -> ShapeDtypeStruct with a sharding.
        """
        return {name: self._read(self.tensors[name], like) for name, like in wanted.items()}

    def _read(self, tensors: Tensors, like: Any) -> jax.Array:
        stacked = len(next(iter(tensors.names()))[0])
        spec = [*like.sharding.spec, *(None,) * (len(like.shape) - len(like.sharding.spec))]
        sharding = NamedSharding(like.sharding.mesh, P(*spec[stacked:]))
        put = _put(like, tensors.added)
        array = jax.jit(lambda: jnp.zeros(like.shape, like.dtype), out_shardings=like.sharding)()

        def piece(view: np.ndarray) -> jax.Array:
            # Devices with the same shard share one copy.
            part = functools.cache(lambda *bounds: np.array(view[tuple(slice(*each) for each in bounds)], order="C"))

            def place(index: Any) -> np.ndarray:
                return part(*((each.start, each.stop) for each in index))

            return jax.make_array_from_callback(view.shape, sharding, place)

        for index, name in tensors.names():
            # Awaited, so that the pieces do not pile up in the host's memory.
            view = tensors.view(self.stored[name].map())
            array = jax.block_until_ready(put(array, piece(view), np.array(index, np.int32)))
        return array


def _put(like: Any, added: float) -> Callable[..., jax.Array]:
    """Return the jitted function (array, piece, index) -> array with the piece at this index of the leading axes."""

    def put(array: jax.Array, piece: jax.Array, index: jax.Array) -> jax.Array:
        piece = piece.astype(like.dtype)
        if added:
            piece += added
        starts = (*index, *(0,) * piece.ndim)
        return lax.dynamic_update_slice(array, piece.reshape(*(1,) * len(index), *piece.shape), starts)

    return jax.jit(put, donate_argnums=0, out_shardings=like.sharding)


def _headers(path: Path) -> dict[str, Stored]:
    """Return the tensors of all safetensors files of a folder.

    Raises:
      UserError: a file is damaged or has a dtype that is not of `TYPES`, or two files have the same tensor.
    """
    found: dict[str, Stored] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safetensors.safe_open(file, "numpy"):  # compares the header with the size of the file
                pass
            with file.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(size))
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise UserError(f"{file}: cannot be read ({error}). Get it again.") from error
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in TYPES:
                raise UserError(
                    f"{file}: {name} has the type {entry['dtype']}: must be one of {', '.join(TYPES)}. Use weights "
                    "that are not quantized."
                )
            if name in found:
                raise UserError(f"{name} is in {found[name].file} and in {file}. Remove one of the files.")
            array = Array(tuple(entry["shape"]), TYPES[entry["dtype"]])
            found[name] = Stored(file, array, 8 + size + entry["data_offsets"][0])
    if not found:
        raise UserError(f"{path} has no safetensors file. Convert its weights to safetensors.")
    return found


def _shown(names: list[str]) -> str:
    return ", ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")
