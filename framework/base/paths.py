"""Paths that users give: of this machine's file system, or gs:// and other buckets through etils.epath."""

import os

from etils import epath

from .errors import UserError


def of(text: str | os.PathLike[str]) -> epath.Path:
    """A path with ~ expanded; a local one is made absolute, so that it means the same in every process."""
    path = epath.Path(text)
    return epath.Path(os.path.abspath(os.path.expanduser(os.fspath(path)))) if is_local(path) else path


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies in this machine's file system."""
    return "://" not in os.fspath(path)


def refuse_bucket(what: str, path: str | os.PathLike[str]) -> None:
    """Raise UserError for a path that has to be one of a file system, and is one of a bucket."""
    if not is_local(path):
        raise UserError(
            f"{what} {path} lies in a bucket; workdirs are locked, appended to and renamed in, which needs a "
            "file system: give a path on a disk or a shared file system, or mount the bucket (gcsfuse)"
        )


def write_text(path: epath.Path, text: str) -> None:
    """Put text at `path`; a reader sees all of it or nothing. In a bucket an object appears whole anyway."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        path.write_text(text)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)
