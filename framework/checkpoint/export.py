"""Write the parameters of a checkpoint as safetensors, for other programs: one file, or a Hugging Face folder.

Files are mapped into memory, and filled with one saved shard after the other, so that memory is bounded by the largest
shard.
"""

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ..base import paths
from ..base.errors import UserError
from ..base.json_files import parse_object
from ..base.model_folder import is_folder, read_config
from ..task import Tensors
from . import store
from .store import FROZEN, MODEL, PARAMS, Array

Target = tuple[tuple[int, ...], np.ndarray]  # an index of the leading axes of an array, and where its values go
Merge = Callable[..., np.ndarray]
_INDEX = "model.safetensors.index.json"
# Files of a folder that belong to its tokenizer or to generation, and fields of its config.json that do.
_TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_OF_TOKENS = ("bos_token_id", "eos_token_id", "max_position_embeddings", "pad_token_id")
DTYPES = ("float32", "bfloat16", "float16")


def export(checkpoint: paths.Path, target: Path, *, model_state: bool, force: bool) -> tuple[int, int]:
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
    prefixes, arrays = (PARAMS, MODEL) if model_state else (PARAMS,), store.arrays(checkpoint)
    for name in (name for prefix in prefixes for name in arrays if name.startswith(prefix)):
        key = name.removeprefix(PARAMS).removeprefix(MODEL).replace("/", ".")
        if (other := keys.setdefault(key, name)) != name:
            raise UserError(f"{other} and {name} would both have the key {key!r}. Rename one of them.")
    metadata = {"format": "flax", "step": str(store.record(checkpoint).step), "source": str(checkpoint)}
    with _complete(target) as partial:
        maps = write(partial, {key: arrays[name] for key, name in keys.items()}, metadata)
        parts = store.parts(checkpoint)
        for key, name in keys.items():
            _fill(parts(name), [((), maps[key])])
        size = partial.stat().st_size
    return len(keys), size


def export_folder(
    checkpoint: paths.Path,
    target: Path,
    tensors: Mapping[str, Tensors],
    files: Mapping[str, bytes],
    dtype: str,
    shard_size: int,
    *,
    state: Mapping[str, Tensors],
    stem: str = "model",
    merged: Merge | None = None,
) -> tuple[int, int]:
    """Write parameters as a Hugging Face folder; return its number of tensors and bytes.

    Args:
      checkpoint: an intact checkpoint.
      target: the folder, which must not exist. A reader sees all of it or nothing.
      tensors: path of each parameter -> its tensors.
      files: other files of the folder, by name.
      dtype: one of `DTYPES`.
      shard_size: largest number of bytes of a file with several tensors.
      state: path of each array of the model state that the folder holds, float32 -> its tensors.
      stem: beginning of the names of the files with tensors.
      merged: if given, the frozen parameters are written, with what this function (path, place, part, read) adds to a
        part of them; `read` returns a trained parameter.

    Raises:
      UserError: the folder exists or cannot be written, or the checkpoint has other parameters.
    """
    if target.exists():
        raise UserError(f"{target} exists. Give another folder.")
    prefix, there = FROZEN if merged else PARAMS, store.arrays(checkpoint)
    saved = {name.removeprefix(prefix): x for name, x in there.items() if name.startswith(prefix)}
    wanted = {path: each.parameter for path, each in tensors.items()}
    if {path: x.shape for path, x in saved.items()} != wanted:
        unlike = sorted(path for path in {*saved, *wanted} if path not in wanted or saved.get(path) != wanted[path])
        raise UserError(f"checkpoint {checkpoint} has other parameters than the model: {', '.join(unlike[:5])}.")
    for path, each in state.items():
        if (saved_state := there.get(f"{MODEL}{path}")) is None or saved_state.shape != each.parameter:
            raise UserError(f"checkpoint {checkpoint} has {path} as {saved_state or 'nothing'}: not that of the model.")
    arrays = {name: Array(each.shape, jnp.dtype(dtype)) for each in tensors.values() for _, name in each.names()}
    arrays |= {name: Array(each.shape, jnp.dtype(jnp.float32)) for each in state.values() for _, name in each.names()}

    @functools.lru_cache(2)
    def read(path: str) -> np.ndarray:
        return store.read(checkpoint, {f"{PARAMS}{path}": None})[f"{PARAMS}{path}"]

    shards = _sharded(arrays, shard_size, stem)
    with _complete(target) as partial:
        partial.mkdir()
        for name, content in files.items():
            (partial / name).write_bytes(content)
        maps: dict[str, np.ndarray] = {}
        for file, names in shards.items():
            maps |= write(partial / file, {name: arrays[name] for name in names}, {"format": "pt"})
        if len(shards) > 1:
            places = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": sum(x.bytes for x in arrays.values())}, "weight_map": places}
            (partial / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        parts = store.parts(checkpoint)
        for path, each in tensors.items():
            added = functools.partial(merged, path, read=read) if merged else None
            _fill(parts(f"{prefix}{path}"), _views(each, maps), each.added, added)
        for path, each in state.items():
            _fill(parts(f"{MODEL}{path}"), _views(each, maps), each.added)
    return len(arrays), sum(x.bytes for x in arrays.values())


class Words(NamedTuple):
    """The tokenizer of a Hugging Face folder.

    Attributes:
      files: contents by name.
      fields: fields of config.json that belong to it.
    """

    files: dict[str, bytes]
    fields: dict[str, Any]


def tokenizer_of(path: Path) -> Words:
    """Return the tokenizer of a Hugging Face folder, of a file in one, or of a tokenizers JSON file of this package.

    Args:
      path: the folder or the file; neither gives no files.

    Raises:
      UserError: a file cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    try:
        if is_folder(folder):
            config = read_config(folder)
            fields = {name: config[name] for name in _OF_TOKENS if name in config}
            return Words(
                {name: (folder / name).read_bytes() for name in _TOKENIZER if (folder / name).exists()}, fields
            )
        if not path.is_file():
            return Words({}, {})
        content = path.read_bytes()
        added = (parse_object(content.decode(errors="replace")) or {}).get("added_tokens", ())
    except OSError as error:
        raise UserError(f"tokenizer {path}: cannot be read ({error.strerror}). Check the path.") from error
    ends = {token["id"]: token["content"] for token in added if token["special"]}
    if len(ends) != 1:
        return Words({"tokenizer.json": content}, {})
    [(number, end)] = ends.items()
    # Documents begin and end with the same token.
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
    files = {"tokenizer.json": content, "tokenizer_config.json": f"{json.dumps(about, indent=2)}\n".encode()}
    return Words(files, {"bos_token_id": number, "eos_token_id": number})


def write(file: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Write a safetensors file of zeros; return its tensors as NumPy arrays that map it.

    Raises:
      OSError: the disk is full, or the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    # Large types first, so that all are aligned.
    for name, array in sorted(arrays.items(), key=lambda item: -np.dtype(item[1].dtype).itemsize):
        header[name] = {"dtype": _code(array.dtype), "shape": array.shape, "data_offsets": (end, end + array.bytes)}
        end += array.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
        if end and hasattr(os, "posix_fallocate"):
            # On a full disk this raises an error; a write to the map would end the process.
            os.posix_fallocate(opened.fileno(), 0, 8 + len(text) + end)
    return {
        name: np.memmap(file, array.dtype, "r+", 8 + len(text) + header[name]["data_offsets"][0], array.shape)
        if array.bytes
        else np.zeros(array.shape, array.dtype)
        for name, array in arrays.items()
    }


def _views(tensors: Tensors, maps: Mapping[str, np.ndarray]) -> list[Target]:
    return [(index, tensors.view(maps[name])) for index, name in tensors.names()]


def _fill(
    parts: Iterable[store.Part],
    targets: Sequence[Target],
    added: float = 0.0,
    merged: Callable[[tuple[slice, ...], np.ndarray], np.ndarray] | None = None,
) -> None:
    """Copy the parts of an array, as `merged` changes it, to its targets, less the number that was added to them."""
    for place, saved in parts:
        values = merged(place, saved) if merged else saved
        for index, view in targets:
            leading, others = place[: len(index)], place[len(index) :]
            if all(each.start <= i < each.stop for i, each in zip(index, leading, strict=True)):
                piece = values[tuple(i - each.start for i, each in zip(index, leading, strict=True))]
                with np.errstate(over="raise"):
                    view[others] = (piece - np.asarray(added, piece.dtype)) if added else piece


def _code(dtype: Any) -> str:
    """Return the name of a dtype in a safetensors file."""
    dtype = np.dtype(dtype)
    names = {jnp.dtype(jnp.bfloat16): "BF16", np.dtype(bool): "BOOL"}
    return names.get(dtype) or f"{dtype.kind.upper()}{8 * dtype.itemsize}"


def _sharded(arrays: Mapping[str, Array], most: int, stem: str) -> dict[str, list[str]]:
    """Return file -> names of its tensors, in the order of the model's layers."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(arrays, key=lambda name: [int(x) if x.isdecimal() else -1 for x in name.split(".")]):
        if size + arrays[name].bytes > most and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += arrays[name].bytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {
        f"{stem}-{number:05}-of-{len(groups):05}.safetensors": names for number, names in enumerate(groups, start=1)
    }


@contextmanager
def _complete(target: Path) -> Iterator[Path]:
    """Yield the path of a file or folder that becomes `target` at the end, or is deleted after an error."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        for path in [partial] if partial.is_file() else partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(target)
    except (OSError, FloatingPointError) as error:
        raise UserError(f"{target} cannot be written ({error}). No part of it is left.") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)
