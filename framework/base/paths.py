"""Handle paths that users give: local ones, and buckets, gs:// and s3://, through etils.epath.

In a bucket a folder is a prefix of names. There are whole objects only: no append, no lock, and no rename.
"""

import importlib.util
import logging
import os
import pathlib
import shutil
import sys
from typing import Any, TypeVar

from etils import epath

from .errors import UserError

Path = epath.Path | pathlib.Path  # of a file or a folder, local or in a bucket

P = TypeVar("P", bound=Path)

_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme -> package that reaches it, extra that installs it
_ERRORS = {  # module -> its errors that are not of the kind OSError
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
}

# fsspec keeps listings, but TensorStore and other processes write objects, too. etils prefers TensorFlow, if installed.
for _scheme in _PACKAGES:
    os.environ.setdefault(f"FSSPEC_{_scheme.upper()}", '{"use_listings_cache": false}')
os.environ.setdefault("EPATH_USE_TF", "false")


def of(text: str | os.PathLike[str]) -> epath.Path:
    """Return a path with ~ expanded; a local one is made absolute, so that all processes mean the same."""
    path = epath.Path(text)
    return epath.Path(os.path.abspath(os.path.expanduser(os.fspath(path)))) if is_local(path) else path


def given(text: str) -> epath.Path:
    """Return a path that a user gives on the command line, with ~ expanded.

    Raises:
      UserError: it is in a bucket that cannot be used.
    """
    _refuse_unknown(text, text)
    return epath.Path(os.path.expanduser(text))


def is_local(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is in this machine's file system, not in a bucket."""
    return "://" not in os.fspath(path)


def refuse_unusable(what: str, path: str | os.PathLike[str]) -> None:
    """Raise UserError for a path in which no run can keep its checkpoints.

    Orbax and fsspec take some characters for patterns.
    """
    _refuse_unknown(f"{what}={path}", path)
    if found := "".join(sorted(set("*?[\\") & set(os.fspath(path)))):
        raise UserError(f"{what}={path}: must not contain {' '.join(found)}. Use another name.")


def errors() -> tuple[type[Exception], ...]:
    """Return the errors of files and buckets, as far as the libraries of buckets are loaded."""
    loaded = [(sys.modules[module], names) for module, names in _ERRORS.items() if module in sys.modules]
    return OSError, *(getattr(module, name) for module, names in loaded for name in names if hasattr(module, name))


def cache_folder() -> epath.Path:
    """Return the folder of this machine that keeps what a run in a bucket needs here."""
    return of(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "shampax"


def listed(folder: P) -> list[P]:
    """Return the files and folders in a folder, sorted; none if it does not exist.

    `folder.glob` would read characters such as "[" in the folder's own name as a pattern.
    """
    found: Any = sorted(path for path in folder.iterdir() if path != folder) if folder.exists() else []
    return found


def files(folder: Path) -> dict[str, int]:
    """Return the size of every file in a folder and in the folders below, by its sorted relative path."""
    if is_local(folder):
        found = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
        sizes = {os.path.relpath(path, folder): _size(path) for path in found}
    else:
        system, root = _system(folder)
        entries: Any = system.find(root, detail=True)
        sizes = {name.removeprefix(root).lstrip("/"): entry["size"] for name, entry in entries.items()}
    return dict(sorted(sizes.items()))


def modified(path: Path) -> float:
    """Return when a file was written, in seconds since 1970."""
    return os.stat(path).st_mtime if is_local(path) else epath.Path(path).stat().mtime


def read_text(path: Path) -> str:
    """Read a text that may be damaged."""
    return path.read_bytes().decode(errors="replace")


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that it contains, if it is there; a local folder as far as possible."""
    if is_local(path) and not path.is_dir():
        path.unlink(missing_ok=True)
    elif is_local(path):
        shutil.rmtree(path, ignore_errors=True)
    elif names := files(path):
        system, root = _system(path)
        system.rm([f"{root}/{name}" if name else root for name in names])


def write_text(path: Path, text: str) -> None:
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


def _refuse_unknown(what: str, path: str | os.PathLike[str]) -> None:
    if is_local(path):
        return
    scheme = os.fspath(path).partition("://")[0]
    if scheme not in _PACKAGES:
        raise UserError(f"{what}: must be a folder, or in a bucket, gs://... or s3://.... Use one of these.")
    package, extra = _PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what}: needs the package {package}. Install it: pip install 'shampax[{extra}]'.")
    logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it warns at every request that may not see the bucket's kind


def _system(path: Path) -> tuple[Any, str]:
    """Return the file system of a bucket, and the path in it."""
    from fsspec.core import url_to_fs  # it takes a tenth of a second to import

    system, root = url_to_fs(os.fspath(path))
    return system, root.rstrip("/")


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # a link to nothing, or just deleted
        return 0
