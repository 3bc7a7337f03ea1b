"""Recognise Hugging Face folders, and read their `config.json`."""

from pathlib import Path
from typing import Any

from .errors import UserError
from .json_files import parse_object, read_object

CONFIG = "config.json"


def is_folder(path: Path) -> bool:
    """Return whether a path is a Hugging Face folder and not a workdir, which has a `config.json`, too."""
    file = path / CONFIG
    return file.is_file() and "model_type" in (parse_object(file.read_text(errors="replace")) or {})


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a folder's `config.json`.

    Raises:
      UserError: the folder has no such file.
    """
    if (config := read_object(path / CONFIG)) is None:
        raise UserError(f"{path} has no {CONFIG}. Give a Hugging Face folder, with its {CONFIG} and safetensors files.")
    return config
