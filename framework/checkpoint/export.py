"""The parameters of a checkpoint as one safetensors file, for programs that know nothing of this package."""

import os
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from ..base.errors import UserError
from . import store
from .inspect import Contents
from .store import MODEL, PARAMS


def export(contents: Contents, target: Path, *, source: str, model_state: bool, force: bool) -> tuple[int, int]:
    """Write the parameters to a file, which is there whole or not at all; returns (arrays, bytes) of it.

    Keys are paths joined by dots: `decoder.layers.attention.query.kernel`. Arrays have the shapes and dtypes that they
    have in training. The metadata name the format of the arrays' layout (flax), the step and the source.

    Args:
      contents: the checkpoint.
      target: the file.
      source: what the metadata are to call the checkpoint.
      model_state: whether to write the other collections, too, by names like `batch_stats.norm.mean`.
      force: whether a file that is there already is to be replaced.

    Raises:
      UserError: the file is there already or cannot be written, or two arrays would have one key.
    """
    if target.exists() and not force:
        raise UserError(f"{target} exists; give another file, or --force to replace it")
    keys: dict[str, str] = {}
    for prefix in (PARAMS, MODEL) if model_state else (PARAMS,):
        for name in contents.arrays:
            if not name.startswith(prefix):
                continue
            key = name.removeprefix(prefix).replace("/", ".")
            if key in keys:
                raise UserError(f"{keys[key]} and {name} would both have the key {key!r}; rename one of them")
            keys[key] = name
    arrays = store.read(contents.path, dict.fromkeys(keys.values()))
    # What is not contiguous would be written in the order in which it lies in memory.
    tensors = {key: np.asarray(arrays[name], order="C") for key, name in keys.items()}
    metadata = {"format": "flax", "step": str(contents.record.step), "source": source}
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        safetensors.numpy.save_file(tensors, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        size = partial.stat().st_size
        partial.replace(target)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{target} cannot be written ({error}); nothing is left of it") from error
    finally:
        partial.unlink(missing_ok=True)
    return len(tensors), size
