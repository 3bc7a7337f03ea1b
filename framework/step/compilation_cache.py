"""Compiled programs on disk: a config that starts again loads what an earlier start has compiled.

JAX writes and reads them, process 0 of a run for all. What JAX leaves open is here: which folder, whom to trust, how
much to keep, and what becomes of an entry that cannot be read. Programs are code: whoever may write to the folder may
run anything as whoever reads it.
"""

import contextlib
import os
import re
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from ..distributed import console

FOLDER = "compilation_cache"
BESIDE = "beside"  # the workdir: runs that have a folder in common have their programs in common
_ENABLED, _DIRECTORY = "jax_enable_compilation_cache", "jax_compilation_cache_dir"
_LEAST_SECONDS = "jax_persistent_cache_min_compile_time_secs"
_ENABLED, _DIRECTORY = "jax_enable_compilation_cache", "jax_compilation_cache_dir"
_LEAST_SECONDS = "jax_persistent_cache_min_compile_time_secs"
_UNREADABLE = re.compile("Error reading persistent compilation cache entry for '(.+?)'")


@contextlib.contextmanager
def kept(workdir: Path, options: Any) -> Iterator[None]:
    """Keep compiled programs while entered, unless this process has been given a cache already, or is to have none.

    Args:
      workdir: of the run.
      options: `config.compilation_cache`.
    """
    folder = _folder(workdir, options.folder)
    if folder is None or jax.config.values[_DIRECTORY] or not jax.config.values[_ENABLED]:
        yield
        return
    if reason := _unusable(folder):
        console.say(f"warning: no compiled programs are kept, {folder} {reason}; see config.compilation_cache.folder")
        yield
        return
    if jax.process_index() == 0:
        prune(folder, round(options.gigabytes * 1e9))
    least_seconds = jax.config.values[_LEAST_SECONDS]
    show = warnings.showwarning

    def show_or_mend(message: Any, *details: Any, **named: Any) -> None:
        # A process that was killed in writing leaves a part. JAX compiles anew, and writes only what is not there.
        if unreadable := _UNREADABLE.match(str(message)):
            for path in folder.glob(f"{unreadable[1]}-*"):
                path.unlink(missing_ok=True)
        else:
            show(message, *details, **named)

    # The many small programs of a start take as long together as the large one.
    jax.config.update(_LEAST_SECONDS, 0.0)
    compilation_cache.set_cache_dir(str(folder))
    warnings.showwarning = show_or_mend
    try:
        yield
    finally:
        warnings.showwarning = show
        jax.config.update(_LEAST_SECONDS, least_seconds)
        jax.config.update(_DIRECTORY, None)
        compilation_cache.reset_cache()


def prune(folder: Path, limit: int) -> None:
    """Delete the programs that nobody has used for longest, until all together have at most `limit` bytes.

    JAX can do this too, but then every process waits for a lock at every program. Here, runs at the same time may each
    exceed the limit by what they compile, and a program that another one is just reading stays readable.
    """
    found = [(path, path.stat()) for path in folder.glob("*-cache")] if folder.exists() else []
    total = 0
    for path, status in sorted(found, key=lambda entry: max(entry[1].st_atime, entry[1].st_mtime), reverse=True):
        total += status.st_size
        if total > limit:
            path.unlink(missing_ok=True)


def _folder(workdir: Path, given: str) -> Path | None:
    if given == BESIDE:
        return workdir.parent / FOLDER
    return Path(given).expanduser().absolute() if given else None


def _unusable(folder: Path) -> str | None:
    """Why a folder cannot be used, as the end of a sentence that begins with it."""
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        return f"cannot be made ({error.strerror})"
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & stat.S_IWOTH:
        return "can be written by others, and programs are code"
    return None if os.access(folder, os.R_OK | os.X_OK) else "cannot be read"
