"""Aim, whose packages need Python 3.12 or older."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .tracker import TrackedRun


@dataclasses.dataclass(frozen=True)
class Aim:
    """Track in a repository of Aim.

    Attributes:
      repo: its folder or address; "" takes the one that Aim finds from the current folder, or makes.
      experiment: "" takes Aim's default.
    """

    repo: str = ""
    experiment: str = ""

    def open(self, run: TrackedRun) -> "_Session":
        """Begin or continue the run."""
        from aim import Repo, Run  # pyright: ignore

        repo = self.repo or Repo.default_repo_path()
        # Aim draws hashes of its own, and attributes can be searched only after Aim's server has indexed them.
        told = f"shampax run {run.id}"
        earlier = Repo.from_path(repo).structured_db.runs() if Repo.exists(repo) else ()  # pyright: ignore
        known = next((each.hash for each in earlier if each.description == told), None)
        session = Run(
            known,
            repo=repo,
            experiment=self.experiment or None,
            force_resume=known is not None,  # the process before this one may have died
            capture_terminal_logs=False,
        )
        session.name = run.name
        session.description = told
        session["config"] = run.config
        session["workdir"] = run.workdir
        return _Session(session)


class _Session:
    def __init__(self, run: Any):
        self._run = run

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._run.track(value, name=name, step=step)

    def texts(self, step: int, texts: Sequence[Mapping[str, str]]) -> None:
        from aim import Text  # pyright: ignore

        for number, each in enumerate(texts):
            self._run.track(Text(f"{each['prompt']} ... {each['text']}"), name=f"samples/{number}", step=step)

    def close(self, complete: bool) -> None:
        self._run.close()
