"""Which checkpoints of a workdir are its newest and its best, and which may go."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

from ..base import workdir as layout
from ..base.errors import UserError
from ..base.json_files import read_object
from . import contents, integrity, store


def best_metric(workdir: Path) -> str:
    """The held-out metric by which a workdir's config ranks checkpoints, "loss" where there is no config.

    Raises:
      UserError: the config cannot be read, or names none.
    """
    content = read_object(workdir / layout.CONFIG)
    if content is None:
        return "loss"
    section = content.get("evaluation")
    metric = section.get("best_metric") if isinstance(section, dict) else None
    if not isinstance(metric, str):
        raise UserError(f"{workdir / layout.CONFIG} has no text evaluation.best_metric; restore it")
    return metric


@dataclasses.dataclass(frozen=True)
class Pruning:
    """What becomes of the finished checkpoints of a workdir, each oldest first.

    Attributes:
      doomed: may go.
      kept: the newest whole ones and the best whole ones.
      damaged: came into question to be kept, each with its first fault. They are left where they are.
    """

    doomed: tuple[Path, ...]
    kept: tuple[Path, ...]
    damaged: tuple[tuple[Path, str], ...]


def prune(workdir: Path, *, keep_last: int, keep_best: int) -> Pruning:
    """Decide what may go; nothing is deleted. Checkpoints are compared with their checksums before they are kept.

    Args:
      workdir: theirs.
      keep_last: how many of the newest whole ones are kept, at least 1.
      keep_best: how many of the whole ones of lowest best metric are kept.

    Raises:
      UserError: there is no whole one, so that nothing may go.
    """
    found = contents.in_workdir(workdir)
    damaged: dict[Path, str] = {}
    known: dict[Path, bool] = {}

    def whole(path: Path) -> bool:
        if path not in known:
            faults = integrity.faults(path)
            known[path] = not faults
            if faults:
                damaged[path] = faults[0]
        return known[path]

    newest = _first(reversed(found), keep_last, whole)
    if not newest:
        reasons = "; ".join(f"{path.name}: {why}" for path, why in damaged.items())
        raise UserError(
            f"no checkpoint of {workdir} is whole ({reasons}), so none is deleted; restore one from a backup"
        )
    best: list[Path] = []
    if keep_best:
        metric = best_metric(workdir)
        scores = {}
        for path in found:
            try:
                scores[path] = store.record(path).score(metric)
            except UserError as error:
                damaged.setdefault(path, str(error))
        ranked = sorted(
            (value, number, path) for number, (path, value) in enumerate(scores.items()) if value is not None
        )
        best = _first((path for *_, path in ranked), keep_best, whole)
    kept = tuple(path for path in found if path in newest or path in best)
    return Pruning(
        tuple(path for path in found if path not in kept and path not in damaged),
        kept,
        tuple((path, damaged[path]) for path in found if path in damaged),
    )


def _first(paths: Iterable[Path], count: int, accepted: Callable[[Path], bool]) -> list[Path]:
    return list(itertools.islice(filter(accepted, paths), count))
