"""The contract of an experiment tracker. Its process imports this module, which imports nothing else of ours."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

HAS_WARNED = 3  # exit code of the process of a tracker that has printed the warning itself


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """A run as its trackers see it.

    Attributes:
      id: kept in the workdir, so that a resumed run continues the same tracked run.
      name: of the workdir's folder.
      workdir: its path.
      config: the resolved config.
    """

    id: str
    name: str
    workdir: str
    config: dict[str, Any]


class Session(Protocol):
    """A tracked run in progress. An error that a method raises turns the tracker off, with one warning."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Track measurements after a step. Several calls may have the same step; a number may be NaN."""
        ...

    def texts(self, step: int, texts: Sequence[Mapping[str, str]]) -> None:
        """Track continuations after a step: objects with "prompt" and "text"."""
        ...

    def close(self, complete: bool) -> None:
        """Finish a run that is complete, or one that ends early and may be resumed."""
        ...


class Tracker(Protocol):
    """A frozen dataclass of options. Its module imports the tracker's package only in `open`."""

    def open(self, run: TrackedRun) -> Session:
        """Begin a tracked run, or continue the one with this id."""
        ...


def warning(name: str, why: str) -> str:
    """Return the warning about a tracker that is given up."""
    return f"warning: the tracker {name} is off ({why}). Training continues; metrics.jsonl has all scalars."
