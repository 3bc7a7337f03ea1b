"""Data sets that the package `datasets` (Hugging Face) has saved on disk: which Arrow files they consist of.

`Dataset.save_to_disk` writes a folder of state.json, dataset_info.json and data-*.arrow; `DatasetDict.save_to_disk` one
such folder for each split, and dataset_dict.json.
"""

from typing import Any

from etils import epath

from ...base.errors import UserError
from ...base.json_files import parse_object

_STATE, _SPLITS = "state.json", "dataset_dict.json"


def files_of(folder: epath.Path) -> list[epath.Path]:
    """Return the files of a saved data set in order, none if the folder does not hold one.

    Raises:
      UserError: its description is corrupt.
    """
    if not (folder / _STATE).exists():
        return []
    state = _read(folder / _STATE)
    try:
        names = [each["filename"] for each in state["_data_files"]]
        if state.get("_indices_data_files") or not all(name == epath.Path(name).name for name in names):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"data.source: {folder / _STATE} does not name the files of a data set in order. Save it again with "
            "flatten_indices() and save_to_disk()."
        ) from None
    return [folder / name for name in names]


def splits_of(folder: epath.Path) -> list[str]:
    """Return the names of the splits of a saved DatasetDict, none if the folder does not hold one.

    Raises:
      UserError: its description is corrupt.
    """
    if not (folder / _SPLITS).exists():
        return []
    splits = _read(folder / _SPLITS).get("splits")
    if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
        raise UserError(f"data.source: {folder / _SPLITS} names no splits. Save the data set again.")
    return splits


def _read(path: epath.Path) -> dict[str, Any]:
    content = parse_object(path.read_text())
    if content is None:
        raise UserError(f"data.source: {path} is not a JSON object. Save the data set again.")
    return content
