"""Weights & Biases. Its environment variables, such as WANDB_PROJECT, WANDB_MODE and WANDB_DIR, are respected."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .tracker import TrackedRun


@dataclasses.dataclass(frozen=True)
class Wandb:
    """Track in a project of Weights & Biases.

    Attributes:
      project: the project; "" takes WANDB_PROJECT, or "shampax".
      entity: the team or user; "" takes WANDB_ENTITY, or the default of the account.
      group: runs to show together, for example those of a sweep.
      tags: of the run.
      mode: "online", "offline" or "disabled"; "" takes WANDB_MODE, or "online".
    """

    project: str = ""
    entity: str = ""
    group: str = ""
    tags: tuple[str, ...] = ()
    mode: str = ""

    def open(self, run: TrackedRun) -> "_Session":
        """Begin or continue the run. Its local files are in the workdir."""
        import wandb

        return _Session(
            wandb.init(
                project=self.project or os.environ.get("WANDB_PROJECT", "shampax"),
                entity=self.entity or None,
                group=self.group or None,
                tags=self.tags or None,
                mode=self.mode or None,  # pyright: ignore[reportArgumentType]
                id=run.id,
                name=run.name,
                resume="allow",
                config=run.config,
                dir=os.environ.get("WANDB_DIR", None if "://" in run.workdir else run.workdir),
                settings=wandb.Settings(console="off", x_stats_pid=os.getppid()),
            )
        )


class _Session:
    def __init__(self, run: Any):
        self._run = run

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def texts(self, step: int, texts: Sequence[Mapping[str, str]]) -> None:
        import wandb

        rows: list[Any] = [[each["prompt"], each["text"]] for each in texts]
        self._run.log({"samples": wandb.Table(columns=["prompt", "text"], data=rows)}, step=step)

    def close(self, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)
