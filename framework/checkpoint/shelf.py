"""List, delete and set aside the checkpoints of a workdir.

In a folder a checkpoint appears, disappears and is set aside by a rename. In a bucket, which has none, it counts while
it has the object that Orbax writes last.
"""

import contextlib
import time

from ..base import paths
from ..base import workdir as layout
from ..base.paths import Path

COMMITTED = "commit_success.txt"  # in a bucket the last object of a checkpoint, written by Orbax
_SET_ASIDE = "damaged.txt"  # in a bucket: why a checkpoint does not count
_DELETED = "deleted"  # in a folder: those to be deleted are renamed into it


def checkpoints(workdir: Path) -> list[Path]:
    """Return the committed checkpoints of a workdir, oldest first."""
    return [path for path in _steps(workdir / layout.CHECKPOINTS) if _counts(path)]


def damaged(workdir: Path) -> list[Path]:
    """Return the checkpoints that were set aside, oldest first."""
    if paths.is_local(workdir):
        return _steps(workdir / layout.DAMAGED)
    return [path for path in _steps(workdir / layout.CHECKPOINTS) if (path / _SET_ASIDE).exists()]


def set_aside(path: Path, why: str) -> None:
    """Let a damaged checkpoint no longer count: move it to `damaged`, or mark it in a bucket.

    Raises:
      OSError: it could not be moved.
    """
    if paths.is_local(path):
        place = path.parent.parent / layout.DAMAGED / path.name
        if place.exists():
            paths.remove(place)
        place.parent.mkdir(exist_ok=True)
        path.rename(place)
    else:
        (path / _SET_ASIDE).write_text(f"{why}\n")
        (path / COMMITTED).unlink(missing_ok=True)


def remove_damaged(workdir: Path, until: int) -> None:
    """Remove checkpoints that were set aside, up to a step that is saved again."""
    for path in damaged(workdir):
        if int(path.name) <= until:
            with contextlib.suppress(*paths.errors()):
                paths.remove(path)


def remove_partial(workdir: Path) -> None:
    """Remove what interrupted saves and deletions have left behind, as far as possible. No save may be in progress."""
    directory = workdir / layout.CHECKPOINTS
    for path in paths.listed(directory):
        if paths.is_local(path):
            partial = path.name.endswith(".orbax-checkpoint-tmp") or path.name == _DELETED
        else:
            partial = path.name.isdecimal() and not _counts(path) and not (path / _SET_ASIDE).exists()
        if partial:
            with contextlib.suppress(*paths.errors()):
                paths.remove(path)


def make_room(path: Path) -> None:
    """Remove what a bucket still has of a checkpoint that is saved again; in a folder Orbax does so."""
    if not paths.is_local(path):
        paths.remove(path)


def delete(path: Path) -> None:
    """Delete a checkpoint, if it is still there: it disappears at once, its files as far as possible.

    Raises:
      OSError: it is still there.
    """
    if not paths.is_local(path):
        (path / COMMITTED).unlink(missing_ok=True)
        paths.remove(path)
        return
    trash = path.parent / _DELETED
    trash.mkdir(exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # somebody else has deleted it
        path.rename(trash / f"{path.name}-{time.time_ns()}")
    paths.remove(trash)


def _steps(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))


def _counts(path: Path) -> bool:
    return paths.is_local(path) or (path / COMMITTED).exists()
