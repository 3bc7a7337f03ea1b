"""Choose the checkpoint that a run starts from. Process 0 decides and all processes obey.

Directories are listed by process 0 alone: the listing of another process may be stale on a network file system.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax

from ..base import paths
from ..base import workdir as layout
from ..base.errors import UserError, told
from ..base.model_folder import is_folder
from ..base.paths import Path
from ..distributed import agreement, console
from . import shelf, store, verify
from .record import Record


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint that the state of a run is taken from.

    Attributes:
      kind: `own` resumes this workdir's run; `resume` continues another workdir's run with its step and optimizer;
        `init` takes only the variables of another run; `scratch` takes nothing.
      path: the checkpoint, for `init` possibly a Hugging Face folder; None for scratch.
      damaged: newer checkpoints that are damaged, newest first, each with its first fault.
    """

    kind: Literal["own", "resume", "init", "scratch"]
    path: Path | None = None
    damaged: tuple[tuple[Path, str], ...] = ()

    def record(self) -> Record:
        """Return the record at the start of the run, as process 0 reads it."""
        path = self.path
        if path is None or self.kind == "init":
            return Record()
        return Record.from_json(agreement.first(lambda: dataclasses.asdict(store.record(path))))

    def __str__(self):
        """One line for the console, and one for each damaged checkpoint."""
        texts = {
            "own": "resuming from {}",
            "resume": "no checkpoint in this workdir; continuing the run of resume_from {}",
            "init": "no checkpoint in this workdir; parameters from init_from {}, step 0, new optimizer state",
            "scratch": "starting from scratch",
        }
        warnings = [f"warning: checkpoint {path} is damaged ({why}); using {self.path}" for path, why in self.damaged]
        return "\n".join([*warnings, texts[self.kind].format(self.path)])


def find(workdir: Path, *, resume_from: str, init_from: str) -> Origin:
    """Return the workdir's own newest intact checkpoint, else that of `resume_from`, else of `init_from`, else scratch.

    Both strings name a workdir, whose newest intact checkpoint counts, or one checkpoint, `WORKDIR/checkpoints/STEP`;
    "" names nothing. `init_from` may also be a Hugging Face folder. All processes together compare the files of a
    checkpoint with their checksums. Writes nothing.

    Raises:
      UserError: every checkpoint of a place is damaged, or a named place has no checkpoint. Another run is never
        used instead of this workdir's own damaged checkpoints.
    """
    if own := _newest("own", str(workdir), lambda: store.checkpoints(workdir)):
        return own
    if resume_from:
        return _named("resume", resume_from)
    if init_from:
        return _named("init", init_from)
    return Origin("scratch")


def set_aside(workdir: Path, origin: Origin) -> None:
    """Set the damaged checkpoints of `workdir` aside, until their steps are saved again."""
    if jax.process_index() != 0:
        return
    for path, why in origin.damaged:
        if path.parent.parent != workdir:
            continue
        try:
            shelf.set_aside(path, why)
        except paths.errors() as error:
            place = workdir / layout.DAMAGED
            console.say(f"warning: {path} cannot be moved to {place} ({told(error)}). It is left alone.")


def _named(kind: Literal["resume", "init"], text: str) -> Origin:
    paths.refuse_unusable(f"config.{kind}_from", text)
    path = paths.of(text)
    if kind == "init" and paths.is_local(path) and agreement.first(lambda: is_folder(path)):
        return Origin(kind, path)
    listing = (lambda: [path]) if store.is_checkpoint(path) else lambda: store.checkpoints(path)
    found = _newest(kind, f"{kind}_from {text}", listing)
    if found is None:
        raise UserError(f"{kind}_from {text} has no checkpoint; give a workdir or WORKDIR/checkpoints/STEP")
    return found


def _newest(kind: Literal["own", "resume", "init"], place: str, listing: Callable[[], Sequence[Path]]) -> Origin | None:
    """Return the newest intact checkpoint of those that process 0 lists, None if it lists none."""

    def faults(path: Path) -> list[str]:
        sums = verify.Sums(**agreement.first(lambda: dataclasses.asdict(verify.read(path))))
        found = store.faults(path, sums, part=jax.process_index(), parts=jax.process_count())
        return [fault for fault in agreement.gather("; ".join(found[:3])) if fault]

    names = agreement.first(lambda: list(map(str, listing())))
    if not names:
        return None
    path, damaged = store.first_intact(place, map(paths.of, reversed(names)), faults)
    return Origin(kind, path, tuple(damaged))
