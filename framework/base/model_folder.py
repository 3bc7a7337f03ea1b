"""Recognise Hugging Face folders, and read their `config.json`.

A folder holds a model, or an adapter of PEFT, which names the folder of its base.
"""

import pathlib
from typing import Any

from .errors import UserError
from .json_files import parse_object, read_object
from .paths import Path, read_text

CONFIG = "config.json"
ADAPTER = "adapter_config.json"


def is_folder(path: Path) -> bool:
    """Return whether a path is a Hugging Face folder and not a workdir, which has a `config.json`, too."""
    file = path / CONFIG
    return is_adapter(path) or (file.is_file() and "model_type" in (parse_object(read_text(file)) or {}))


def is_adapter(path: Path) -> bool:
    """Return whether a path is a folder with an adapter of PEFT."""
    return (path / ADAPTER).is_file()


def base_of(path: Path) -> pathlib.Path:
    """Return the folder of the base of an adapter; that of a model is itself.

    Raises:
      UserError: there is no such folder.
    """
    if not is_adapter(path):
        return pathlib.Path(path)
    named = str(read_adapter(path).get("base_model_name_or_path") or "")
    base = (pathlib.Path(path) / pathlib.Path(named).expanduser()).resolve()
    if not named or is_adapter(base) or not is_folder(base):
        raise UserError(
            f"{path / ADAPTER}: base_model_name_or_path={named!r}: must be a folder with a model. Set it to the folder "
            "of the base."
        )
    return base


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a folder's `config.json`, of an adapter that of its base.

    Raises:
      UserError: the folder has no such file.
    """
    path = base_of(path)
    if (config := read_object(path / CONFIG)) is None:
        raise UserError(f"{path} has no {CONFIG}. Give a Hugging Face folder, with its {CONFIG} and safetensors files.")
    return config


def read_adapter(path: Path) -> dict[str, Any]:
    """Return the content of a folder's `adapter_config.json`, {} if it has no adapter."""
    return read_object(path / ADAPTER) or {}
