"""Claim a workdir for one config and one run, and write the run's result. Process 0 reads and writes for all."""

import contextlib
import datetime
import errno
import fcntl
import itertools
import json
import math
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ..base import paths
from ..base import workdir as layout
from ..base.errors import UserError, told
from ..base.json_files import parse_object
from ..base.paths import Path
from ..config import check as config_lib
from ..distributed import agreement, console
from .origin import Origin


def finished(workdir: Path, config: Any) -> dict[str, Any] | None:
    """Check that a workdir is new or belongs to this config, and return the result of a complete run.

    Returns:
      The result; None if the run is incomplete or `duration` has changed since.

    Raises:
      UserError: it belongs to another config; the message names the keys that differ.
    """

    def result() -> dict[str, Any] | None:
        path = workdir / layout.CONFIG
        if not path.exists():
            return None
        stored = parse_object(paths.read_text(path))
        if stored is None:  # after a power loss
            console.say(f"warning: {path} is not a JSON object. It is written again, from this config.")
            return None
        if changed := config_lib.differences(stored, config, config_lib.may_change(config)):
            raise UserError(config_lib.foreign(workdir, changed))
        with contextlib.suppress(UserError):  # a damaged result is written again, from the newest checkpoint
            result = layout.read_result(workdir)
            if result and result["stopped"] is None and stored.get("duration") == config.duration:
                return result
        _compare_microbatches(stored, config)
        return None

    return agreement.first(result)


def continued(checkpoint: Path, config: Any) -> None:
    """Warn if the next steps differ from those of the run of another workdir that wrote a checkpoint."""
    path = paths.of(checkpoint).parent.parent / layout.CONFIG
    with contextlib.suppress(*paths.errors()):  # it may be a copy without a config
        if jax.process_index() == 0:
            _compare_microbatches(parse_object(paths.read_text(path)) or {}, config)


def schedule_begin(start: Origin, step: int, config: Any) -> str:
    """Return where the schedule begins: a duration from the start of the run.

    A run that continues another workdir's run warms up again if its schedule is another one. Once a run has begun, its
    workdir's config keeps the decision.

    Args:
      start: the checkpoint that the run starts from.
      step: of the checkpoint.
      config: of this run; only `schedule.begin="auto"` is decided here.
    """
    if config.schedule.begin != "auto":
        return config.schedule.begin
    if start.path is None or start.kind == "init":
        return "0 steps"
    path = paths.of(start.path).parent.parent / layout.CONFIG
    stored = agreement.first(lambda: (parse_object(paths.read_text(path)) if path.exists() else None) or {})
    before = stored.get("schedule")
    if not isinstance(before, dict):  # a copy of a checkpoint without a config
        return "0 steps"
    began = before.pop("begin", "0 steps")
    now = {key: value for key, value in config.schedule.to_dict().items() if key != "begin"}
    changed = start.kind == "resume" and before != now
    return f"{step} steps" if changed else str(began)


def _compare_microbatches(stored: dict[str, Any], config: Any) -> None:
    if stored.get("microbatches", config.microbatches) != config.microbatches:
        console.say(
            f"warning: config.microbatches was {stored['microbatches']} and is {config.microbatches}. Dropout "
            "draws other random numbers for each split of a batch: the next steps are not those of the run so far."
        )


@contextlib.contextmanager
def hold(workdir: Path, silence: float = 60.0) -> Iterator[Callable[[], None]]:
    """Hold a workdir for this run while entered; a workdir that is empty afterwards is removed.

    Process 0 locks a file, and the lock ends with the process. Where the file system has no locks, a second run takes
    over the workdir, and the first one stops at its next save. A bucket has none: see `_owned`.

    Args:
      workdir: the workdir.
      silence: seconds without a sign of life after which other runs take over a workdir in a bucket.

    Yields:
      A check that every process calls. It raises UserError if another run has taken over the workdir.

    Raises:
      UserError: another run holds the workdir, or it cannot be made.
    """
    run = f"process {os.getpid()} on {socket.gethostname()}, run {uuid.uuid4().hex[:12]}"
    with contextlib.ExitStack() as stack:
        agreement.first(lambda: stack.enter_context(lock(workdir, run, silence)))
        yield lambda: agreement.first(lambda: _check(workdir, run))


def lock(workdir: Path, run: str = "", silence: float = 60.0) -> contextlib.AbstractContextManager[None]:
    """Lock a workdir in this process while entered, and write `run` into the file if it is given.

    Raises:
      UserError: another process holds the lock, or the workdir cannot be made.
    """
    return (
        _locked(workdir, run) if paths.is_local(workdir) else _owned(workdir / layout.LOCK, run or "a command", silence)
    )


@contextlib.contextmanager
def _owned(path: Path, run: str, silence: float) -> Iterator[None]:
    """Own the object `path` while entered.

    It holds `run` and a number that grows several times in `silence` seconds. Whoever finds the object waits for the
    number to grow, as long as the object says, before taking over. Two runs that start at once may both get here: the
    one whose name is not in the object stops at its next check.

    Raises:
      UserError: another run owns it.
    """
    over = threading.Event()
    try:
        _refuse_living(path)
        path.write_text(_sign(run, 0, silence))
    except paths.errors() as error:
        raise UserError(f"workdir {path.parent} cannot be used ({told(error)}); give another --workdir") from error

    def live() -> None:
        for number in itertools.count(1):
            if over.wait(silence / 6):
                return
            with contextlib.suppress(*paths.errors()):  # tried again
                if _holder(path) != run:
                    return
                path.write_text(_sign(run, number, silence))

    thread = threading.Thread(target=live, daemon=True, name="owner of the workdir")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(*paths.errors()):
            if _holder(path) == run:
                path.unlink(missing_ok=True)


def _sign(run: str, number: int, silence: float) -> str:
    return f"{run}\nsign of life {number}; gone after {silence:g} s without another\n"


def _refuse_living(path: Path) -> None:
    """Wait until the run that owns an object has ended or been silent for as long as it says.

    Raises:
      UserError: it lives.
    """
    if not (found := _content(path)):
        return
    match = re.search(r"gone after ([0-9.e+]+) s", found)
    seconds = float(match[1]) if match else 60.0
    holder = _holder(path)
    console.say(f"{path.parent} was in use by {holder}; waiting up to {seconds:.0f} s for a sign of life")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(1.0, seconds / 10))
        now = _content(path)
        if not now:
            return
        if now != found:
            raise UserError(
                f"workdir {path.parent} is in use by {holder}; wait for its end, stop it, or use another --workdir"
            )


def _content(path: Path) -> str:
    try:
        return paths.read_text(path)
    except FileNotFoundError:
        return ""


@contextlib.contextmanager
def _locked(workdir: Path, run: str) -> Iterator[None]:
    made = not workdir.exists()
    path = workdir / layout.LOCK
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115  closed below
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
            console.say(
                f"warning: workdir {workdir} cannot be locked ({error.strerror}). Start no second run in it: it would "
                "take over the workdir, and this run would stop."
            )
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
        return paths.read_text(path).strip().partition("\n")[0] or "another process"
    except paths.errors() as error:
        return f"another process ({path}: {told(error)})"


def claim(workdir: Path, config: Any) -> None:
    """Write the config into the workdir; the result of an earlier, stopped run is deleted.

    What has changed since the last start is written, too, into a file that is named by the time.
    """
    if jax.process_index() != 0:
        return
    path = workdir / layout.CONFIG
    stored = parse_object(paths.read_text(path)) if path.exists() else None
    if stored and (changed := config_lib.differences(stored, config, ("may_change",))):
        now = datetime.datetime.now(datetime.UTC)
        lines = "".join(f"{line}\n" for line in changed)
        paths.write_text(workdir / layout.CHANGES / f"{now:%Y-%m-%dT%H-%M-%S.%fZ}.txt", lines)
        console.say(f"changed since the last start: {', '.join(changed)}")
    (workdir / layout.RESULT).unlink(missing_ok=True)
    paths.write_text(path, config_lib.to_json(config))


def finish(workdir: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write the result and return it as written; numbers that are not finite become None."""
    result = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in result.items()
    }
    if jax.process_index() == 0:
        paths.write_text(workdir / layout.RESULT, json.dumps(result, indent=2) + "\n")
    return result
