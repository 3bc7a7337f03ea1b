"""Write the parameters of a checkpoint as one safetensors file, for other programs."""

import os
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from ..base.errors import UserError
from . import store
from .store import MODEL, PARAMS


def export(checkpoint: Path, target: Path, *, model_state: bool, force: bool) -> tuple[int, int]:
    """Write the parameters to a file and return its number of arrays and bytes. A reader sees all of it or nothing.

    Keys are paths joined by dots: `decoder.layers.attention.query.kernel`. Arrays have the shapes and dtypes of
    training. The metadata have the layout of the arrays (flax), the step and the source.

    Args:
      checkpoint: an intact checkpoint.
      target: the file.
      model_state: whether to write the other collections, too, with names like `batch_stats.norm.mean`.
      force: whether to replace an existing file.

    Raises:
      UserError: the file exists or cannot be written, or two arrays would have one key.
    """
    if target.exists() and not force:
        raise UserError(f"{target} exists. Give another file, or --force to replace it.")
    keys: dict[str, str] = {}
    prefixes = (PARAMS, MODEL) if model_state else (PARAMS,)
    for name in (name for prefix in prefixes for name in store.arrays(checkpoint) if name.startswith(prefix)):
        key = name.removeprefix(PARAMS).removeprefix(MODEL).replace("/", ".")
        if (other := keys.setdefault(key, name)) != name:
            raise UserError(f"{other} and {name} would both have the key {key!r}. Rename one of them.")
    arrays = store.read(checkpoint, dict.fromkeys(keys.values()))
    # safetensors writes an array in the order of its memory.
    tensors = {key: np.asarray(arrays[name], order="C") for key, name in keys.items()}
    metadata = {"format": "flax", "step": str(store.record(checkpoint).step), "source": str(checkpoint)}
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        safetensors.numpy.save_file(tensors, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        size = partial.stat().st_size
        partial.replace(target)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{target} cannot be written ({error}). No part of it is left.") from error
    finally:
        partial.unlink(missing_ok=True)
    return len(tensors), size
