"""A workdir belongs to one config, and its run is over once it holds a result: the files that say so."""

import contextlib
import fcntl
import json
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from ..base import workdir as layout
from ..base.errors import UserError
from ..base.json_files import read_object
from ..config import check as config_lib
from ..distributed import agreement


def refuse_foreign(workdir: Path, config: Any) -> None:
    """Make sure that the workdir is new or belongs to this config.

    Raises:
      UserError: it belongs to another one; the message names the keys that differ.
    """
    stored = workdir / layout.CONFIG
    if not stored.exists():
        return
    changed = config_lib.differences(stored.read_text(errors="replace"), config, config_lib.may_change(config))
    if changed:
        raise UserError(config_lib.foreign(workdir, changed))


def finished(workdir: Path, config: Any) -> dict[str, Any] | None:
    """The result of a run that went to its end, or None; a run whose duration was changed since has another end."""
    result, stored = layout.read_result(workdir), read_object(workdir / layout.CONFIG)
    if result is None or stored is None or stored.get("duration") != config.duration:
        return None
    return result if result["stopped"] is None else None


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Keep a workdir for this run while entered; a workdir that holds nothing afterwards is removed.

    The lock goes with the process, however that ends. It is taken by process 0, for all.

    Raises:
      UserError: another run holds it, or it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        agreement.first(lambda: stack.enter_context(_locked(workdir)))
        yield


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    made = not workdir.exists()
    path = workdir / layout.LOCK
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be used ({error.strerror}); give another --workdir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"workdir {workdir} is in use by {holder}; wait for its end, stop it, or use another --workdir"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            # Whoever opened the file meanwhile would hold a lock on a file without a name.
            if made and [*workdir.iterdir()] == [path]:
                path.unlink()
                workdir.rmdir()


def claim(workdir: Path, config: Any) -> None:
    """Make the workdir and write the config into it; the result of an earlier, stopped run goes."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / layout.RESULT).unlink(missing_ok=True)
        _write(workdir / layout.CONFIG, config_lib.to_json(config))


def finish(workdir: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write the result and return what was written: numbers that are not finite become None."""
    result = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in result.items()
    }
    if jax.process_index() == 0:
        _write(workdir / layout.RESULT, json.dumps(result, indent=2) + "\n")
    return result


def _write(path: Path, content: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(content)
    partial.replace(path)
