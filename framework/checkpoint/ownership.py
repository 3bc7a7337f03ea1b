"""Claim a workdir for one config and one run, and write the run's result. Process 0 reads and writes for all."""

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from ..base import workdir as layout
from ..base.errors import UserError
from ..base.json_files import read_object
from ..config import check as config_lib
from ..distributed import agreement


def refuse_foreign(workdir: Path, config: Any) -> None:
    """Check that the workdir is new or belongs to this config.

    Raises:
      UserError: it belongs to another one; the message names the keys that differ.
    """

    def refuse() -> None:
        stored = workdir / layout.CONFIG
        if not stored.exists():
            return
        changed = config_lib.differences(stored.read_text(errors="replace"), config, config_lib.may_change(config))
        if changed:
            raise UserError(config_lib.foreign(workdir, changed))

    agreement.first(refuse)


def finished(workdir: Path, config: Any) -> dict[str, Any] | None:
    """Return the result of a complete run, or None if it is incomplete or `duration` has changed since."""

    def result() -> dict[str, Any] | None:
        result, stored = layout.read_result(workdir), read_object(workdir / layout.CONFIG)
        if result is None or stored is None or stored.get("duration") != config.duration:
            return None
        return result if result["stopped"] is None else None

    return agreement.first(result)


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[Callable[[], None]]:
    """Hold a workdir for this run while entered; a workdir that is empty afterwards is removed.

    Process 0 locks a file, and the lock ends with the process. Where the file system has no locks, a second run takes
    over the workdir, and the first one stops at its next save.

    Yields:
      A check that every process calls. It raises UserError if another run has taken over the workdir.

    Raises:
      UserError: another run holds the workdir, or it cannot be made.
    """
    run = f"process {os.getpid()} on {socket.gethostname()}, run {uuid.uuid4().hex[:12]}"
    with contextlib.ExitStack() as stack:
        agreement.first(lambda: stack.enter_context(lock(workdir, run)))
        yield lambda: agreement.first(lambda: _check(workdir, run))


@contextlib.contextmanager
def lock(workdir: Path, run: str = "") -> Iterator[None]:
    """Lock a workdir in this process while entered, and write `run` into the file if it is given.

    Raises:
      UserError: another process holds the lock, or the workdir cannot be made.
    """
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
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"workdir {workdir} is in use by {_holder(path)}; wait for its end, stop it, or use another "
                    "--workdir"
                ) from error
        if run:
            file.truncate(0)
            file.write(f"{run}\n")
            file.flush()
        try:
            yield
        finally:
            # Removing only the file would free its name for a second lock while another process opens this one.
            if made and [*workdir.iterdir()] == [path]:
                path.unlink()
                workdir.rmdir()


def _check(workdir: Path, run: str) -> None:
    holder = _holder(workdir / layout.LOCK)
    if holder != run:
        raise UserError(
            f"workdir {workdir} has been taken over by {holder}; this run ({run}) stops without saving. "
            "Use one workdir for each run"
        )


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip() or "another process"
    except OSError as error:
        return f"another process ({path}: {error.strerror})"


def claim(workdir: Path, config: Any) -> None:
    """Make the workdir and write the config into it; the result of an earlier, stopped run is deleted."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / layout.RESULT).unlink(missing_ok=True)
        _write(workdir / layout.CONFIG, config_lib.to_json(config))


def finish(workdir: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write the result and return it as written; numbers that are not finite become None."""
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
