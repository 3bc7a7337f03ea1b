"""Handle paths that users give: local ones, and gs:// and other buckets through etils.epath."""

import os
import pathlib

from etils import epath

from .errors import UserError


def of(text: str | os.PathLike[str]) -> epath.Path:
    """Return a path with ~ expanded; a local one is made absolute, so that all processes mean the same."""
    path = epath.Path(text)
    return epath.Path(os.path.abspath(os.path.expanduser(os.fspath(path)))) if is_local(path) else path


def is_local(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is in this machine's file system, not in a bucket."""
    return "://" not in os.fspath(path)


def refuse_unusable(what: str, path: str | os.PathLike[str]) -> None:
    """Raise UserError for a path in which no run can keep its checkpoints.

    A run locks its workdir, appends to files and renames there, and Orbax takes the name for a pattern.
    """
    if not is_local(path):
        raise UserError(f"{what}={path}: must not be in a bucket. Use a disk, or mount the bucket (gcsfuse).")
    if found := "".join(sorted(set("*?[\\") & set(os.fspath(path)))):
        raise UserError(f"{what}={path}: must not contain {' '.join(found)}. Use another name.")


def listed(folder: epath.Path) -> list[epath.Path]:
    """Return the files and folders in a folder, sorted; none if it does not exist.

    `folder.glob` would read characters such as "[" in the folder's own name as a pattern.
    """
    return sorted(folder.iterdir()) if folder.exists() else []


def write_text(path: epath.Path | pathlib.Path, text: str) -> None:
    """Write text to `path` so that readers see all of it or nothing, even after a power loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        path.write_text(text)  # a bucket shows only whole objects
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # some file systems rename before they write
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
