"""Handle paths that users give: local ones, and gs:// and other buckets through etils.epath."""

import os

from etils import epath

from .errors import UserError


def of(text: str | os.PathLike[str]) -> epath.Path:
    """Return a path with ~ expanded; a local one is made absolute, so that all processes mean the same."""
    path = epath.Path(text)
    return epath.Path(os.path.abspath(os.path.expanduser(os.fspath(path)))) if is_local(path) else path


def is_local(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is in this machine's file system, not in a bucket."""
    return "://" not in os.fspath(path)


def refuse_bucket(what: str, path: str | os.PathLike[str]) -> None:
    """Raise UserError for a path that has to be one of a file system, and is one of a bucket."""
    if not is_local(path):
        raise UserError(
            f"{what} {path} lies in a bucket; workdirs are locked, appended to and renamed in, which needs a "
            "file system: give a path on a disk or a shared file system, or mount the bucket (gcsfuse)"
        )


def write_text(path: epath.Path, text: str) -> None:
    """Write text to `path` so that readers see all of it or nothing, as they always do in a bucket."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        path.write_text(text)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)
