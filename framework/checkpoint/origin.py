"""Where the state of a run is taken from: the newest whole checkpoint of its own, of another run, or nothing."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax

from ..base import paths
from ..base import workdir as layout
from ..base.errors import UserError
from ..distributed import agreement
from . import integrity, store
from .record import Record


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the state of a run is taken from.

    `own` continues this workdir, `resume` continues the run of another workdir (step, optimizer and all), `init` takes
    only the variables of another run, `scratch` takes nothing.

    Attributes:
      kind: one of them.
      path: the checkpoint, None for scratch.
      damaged: newer checkpoints that are not whole, newest first, each with what is wrong with it.
    """

    kind: Literal["own", "resume", "init", "scratch"]
    path: Path | None = None
    damaged: tuple[tuple[Path, str], ...] = ()

    @property
    def workdirs(self) -> list[Path]:
        """The workdir of the run that is continued, if there is one."""
        return [] if self.path is None or self.kind == "init" else [self.path.parent.parent]

    def record(self) -> Record:
        """What the host knows at the start of a run with this origin."""
        return Record() if self.path is None or self.kind == "init" else store.record(self.path)

    def __str__(self):
        """One line for the console, and one for each damaged checkpoint."""
        texts = {
            "own": "resuming from {}",
            "resume": "no checkpoint in this workdir; continuing the run of resume_from {}",
            "init": "no checkpoint in this workdir; parameters from init_from {}, step 0, optimizer afresh",
            "scratch": "starting from scratch",
        }
        instead = f"{self.path} is used" if self.path else "the run begins anew"
        warnings = [f"warning: checkpoint {path} is damaged ({why}); {instead}" for path, why in self.damaged]
        return "\n".join([*warnings, texts[self.kind].format(self.path)])


def find(workdir: Path, *, resume_from: str, init_from: str) -> Origin:
    """The workdir's own newest whole checkpoint, else that of `resume_from`, else that of `init_from`, else scratch.

    Both strings name a workdir (its newest whole checkpoint counts) or one checkpoint, `WORKDIR/checkpoints/STEP`;
    "" is none. Every file of a checkpoint is read, by the processes in turns, and compared with its checksum. Writes
    nothing.

    Raises:
      UserError: there is no whole checkpoint where one is to be taken from; the workdir's own are never passed over
        for another run's.
    """
    damaged: list[tuple[Path, str]] = []
    own = _newest_whole("own", str(workdir), store.numbered(workdir), damaged)
    if own is not None:
        return own
    # What is left are saves that were cut short before there was any whole checkpoint.
    if resume_from:
        return _named("resume", resume_from, damaged)
    if init_from:
        return _named("init", init_from, damaged)
    return Origin("scratch", None, tuple(damaged))


def newest_of(workdir: Path, steps: Callable[[int], bool]) -> Origin:
    """The newest whole checkpoint of a workdir whose step is one of `steps`.

    Raises:
      UserError: there is none.
    """
    found = [path for path in store.finished(workdir) if steps(int(path.name))]
    origin = _newest_whole("own", str(workdir), found, [])
    if origin is None:
        raise UserError(f"{workdir} holds no checkpoint to go back to")
    return origin


def set_aside(workdir: Path, origin: Origin) -> None:
    """Move what is damaged or was not saved to its end out of the checkpoints of `workdir`, into its `damaged`."""
    if jax.process_index() != 0:
        return
    unfinished = [path for path in store.numbered(workdir) if not integrity.is_sealed(path)]
    damaged = [path for path, _ in origin.damaged if path.parent.parent == workdir]
    for path in dict.fromkeys([*unfinished, *damaged]):
        place = workdir / layout.DAMAGED / path.name
        place.parent.mkdir(exist_ok=True)
        number = 1
        while place.exists():
            number += 1
            place = place.with_name(f"{path.name}-{number}")
        path.rename(place)


def _named(kind: Literal["resume", "init"], text: str, damaged: list[tuple[Path, str]]) -> Origin:
    paths.refuse_bucket(f"{kind}_from", text)
    path = Path(text).expanduser().absolute()
    one = path.name.isdecimal() and path.parent.name == layout.CHECKPOINTS
    found = [path] if one and path.is_dir() else store.numbered(path)
    origin = _newest_whole(kind, f"{kind}_from {text}", found, damaged)
    if origin is None:
        raise UserError(f"{kind}_from {text} holds no finished checkpoint; give a workdir or WORKDIR/checkpoints/STEP")
    return origin


def _newest_whole(
    kind: Literal["own", "resume", "init"], place: str, found: Sequence[Path], damaged: list[tuple[Path, str]]
) -> Origin | None:
    """The newest that is whole; what was passed over is added to `damaged`. None where no save came to an end."""
    for path in reversed(found):
        faults = integrity.faults(path, part=jax.process_index(), parts=jax.process_count())
        faults = [fault for fault in agreement.gather("; ".join(faults[:3])) if fault]
        if not faults:
            return Origin(kind, path, tuple(damaged))
        damaged.append((path, faults[0]))
    if any(map(integrity.is_sealed, found)):
        reasons = "; ".join(f"{path.name}: {why}" for path, why in damaged)
        raise UserError(
            f"no checkpoint of {place} is whole ({reasons}); restore one from a backup, or use another workdir"
        )
    return None
