"""Keep compiled programs in a folder, so that a config that starts again loads them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from ..base import paths
from ..distributed import console

FOLDER = "compilation_cache"
BESIDE = "beside"  # the workdir


@contextlib.contextmanager
def kept(workdir: paths.Path, options: Any) -> Iterator[None]:
    """Keep compiled programs while entered, unless a cache is set already, disabled, or cannot be used.

    Args:
      workdir: workdir of the run.
      options: `config.compilation_cache`.
    """
    given = jax.config.values
    if not options.folder or given["jax_compilation_cache_dir"] or not given["jax_enable_compilation_cache"]:
        yield
        return
    beside = workdir.parent if paths.is_local(workdir) else paths.cache_folder()
    folder = Path(beside / FOLDER if options.folder == BESIDE else paths.of(options.folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            prune(folder, round(options.gigabytes * 1e9))
    except OSError as error:
        console.say(f"warning: config.compilation_cache.folder={folder}: cannot be used ({error.strerror}).")
        yield
        return
    least_seconds = given["jax_persistent_cache_min_compile_time_secs"]
    # The many small programs of a start take as long to compile as the train step.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.set_cache_dir(str(folder))
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


def prune(folder: Path, limit: int) -> None:
    """Delete the least recently used programs until all together have at most `limit` bytes.

    JAX's own limit (`jax_compilation_cache_max_size`) locks the folder at every program in every process, and a process
    killed during a write leaves an entry after which JAX stores no program in that folder again (jax 0.10.2).
    """
    found = [(path, path.stat()) for path in folder.glob("*-cache")]
    total = 0
    for path, status in sorted(found, key=lambda entry: max(entry[1].st_atime, entry[1].st_mtime), reverse=True):
        total += status.st_size
        if total > limit:
            path.unlink(missing_ok=True)
