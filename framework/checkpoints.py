"""Checkpoints: saved in the background, restored onto any mesh. The only file that knows Orbax."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo, PreservationContext, PreservationPolicy

from ..optimizers import patterns
from . import workdir as layout
from .errors import UserError
from .state import TrainState

_STATE = "state"
_RECORD = "record"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out metrics by name, and the step they were measured after."""

    step: int
    values: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Record:
    """What the host knows of a run beside the train state; saved with it as JSON.

    Attributes:
      step: steps taken.
      seconds: training time, evaluation, saving and compilation left out.
      tokens: tokens trained on.
      last: the latest evaluation, if there was one.
      best: the best evaluation so far, by the config's best metric.
      devices: how many devices have saved the state; the layout of an optimizer's state may depend on it.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    last: Evaluation | None = None
    best: Evaluation | None = None
    devices: int = 0

    @property
    def evaluated(self) -> bool:
        """Whether the latest evaluation is that of this step."""
        return self.last is not None and self.last.step == self.step

    def with_evaluation(self, values: dict[str, float], best_metric: str) -> "Record":
        """This record after an evaluation at its step; `best` is kept where the metric is not lower, or not finite."""
        new = Evaluation(self.step, values)

        def rank(evaluation: Evaluation) -> float:
            value = evaluation.values[best_metric]
            return value if math.isfinite(value) else math.inf

        better = self.best is None or rank(new) < rank(self.best)
        return dataclasses.replace(self, last=new, best=new if better else self.best)

    def to_json(self) -> dict[str, Any]:
        """As plain dicts."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Record":
        """The inverse of `to_json`."""
        evaluations = {key: Evaluation(**content[key]) for key in ("last", "best") if content[key] is not None}
        return cls(**{**content, **evaluations})


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the state of a run is taken from.

    `own` continues this workdir, `resume` continues the run of another workdir (step, optimizer and all),
    `init` takes only the variables of another run, `scratch` takes nothing. `path` is the checkpoint, None
    for scratch.
    """

    kind: Literal["own", "resume", "init", "scratch"]
    path: Path | None = None

    @property
    def workdirs(self) -> list[Path]:
        """The workdir of the run that is continued, if there is one."""
        return [] if self.path is None or self.kind == "init" else [self.path.parent.parent]

    def record(self) -> Record:
        """What the host knows at the start of a run with this origin."""
        if self.path is None or self.kind == "init":
            return Record()
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            return Record.from_json(checkpointer.restore(self.path.absolute() / _RECORD))

    def __str__(self):
        """One line for the console."""
        texts = {
            "own": "resuming from {}",
            "resume": "no checkpoint in this workdir; continuing the run of resume_from {}",
            "init": "no checkpoint in this workdir; parameters from init_from {}, step 0, optimizer afresh",
            "scratch": "starting from scratch",
        }
        return texts[self.kind].format(self.path)


def find_origin(workdir: Path, *, resume_from: str, init_from: str) -> Origin:
    """The workdir's own newest checkpoint, else that of `resume_from`, else that of `init_from`, else
    scratch.

    Both strings name a workdir (its newest checkpoint counts) or one checkpoint, `WORKDIR/checkpoints/STEP`;
    "" is none. Writes nothing.

    Raises:
      UserError: there is no checkpoint where one is to be taken from.
    """
    own = _newest(workdir / layout.CHECKPOINTS)
    if own:
        return Origin("own", own)
    if resume_from:
        return Origin("resume", _named("resume_from", resume_from))
    if init_from:
        return Origin("init", _named("init_from", init_from))
    return Origin("scratch")


def _named(key: str, text: str) -> Path:
    path = Path(text).expanduser().absolute()
    found = path if path.name.isdecimal() and path in _all(path.parent) else _newest(path / layout.CHECKPOINTS)
    if found is None:
        raise UserError(f"{key} {text} holds no finished checkpoint; give a workdir or WORKDIR/checkpoints/STEP")
    return found


def _all(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return [directory / str(step) for step in sorted(ocp.utils.checkpoint_steps(directory))]


def _newest(directory: Path) -> Path | None:
    return next(reversed(_all(directory)), None)


def restore(path: Path, abstract: TrainState) -> TrainState:
    """The state of a checkpoint, laid out as `abstract` says, whatever mesh it was saved from.

    Args:
      path: the checkpoint.
      abstract: ShapeDtypeStructs with shardings, which `check` has compared with the checkpoint.
    """
    return _restore(path, abstract, partial=False)


def restore_variables(path: Path, abstract: TrainState) -> dict[str, Any]:
    """`{"params": ..., "model_state": ...}` of a checkpoint, laid out as in `abstract`; the rest is not read."""
    return _restore(path, _variables(abstract), partial=True)


def check(origin: Origin, abstract: TrainState) -> None:
    """Compare the names, shapes and types of a checkpoint's arrays with `abstract`; reads no array.

    Raises:
      UserError: they differ; Orbax would pad, cut or keep initial values.
    """
    if origin.path is None:
        return
    path = origin.path.absolute() / _STATE
    saved = ocp.PyTreeCheckpointHandler().metadata(path).tree  # type: ignore  (typed for etils' paths)
    wanted: Any = abstract
    if origin.kind == "init":
        wanted = _variables(abstract)
        saved = {key: saved[key] for key in wanted}
    _check_same_arrays(path, saved, wanted)


def _variables(abstract: TrainState) -> dict[str, Any]:
    return {"params": abstract.params, "model_state": abstract.model_state}


def _restore(path: Path, abstract: Any, *, partial: bool) -> Any:
    path = path.absolute() / _STATE
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=partial)
        return checkpointer.restore(path, args=args)


def _check_same_arrays(path: Path, saved: Any, abstract: Any) -> None:
    have, need = _arrays(saved), _arrays(abstract)
    if have == need:
        return
    shown = [
        f"{name} is {have.get(name, 'absent')} there and {need.get(name, 'absent')} here"
        for name in sorted(have.keys() | need.keys())
        if have.get(name) != need.get(name)
    ]
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    raise UserError(
        f"checkpoint {path.parent} is of another model or optimizer: {'; '.join(shown[:3])}{more}; "
        "use the config it was made with"
    )


def _arrays(tree: Any) -> dict[str, str]:
    leaves = jax.tree.leaves(tree)
    return {
        path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in zip(patterns.paths(tree), leaves, strict=True)
    }


class Checkpoints:
    """The checkpoints of a workdir: the `keep_last` newest and `keep_best` of lowest `best_metric`."""

    def __init__(self, workdir: Path, *, keep_last: int, keep_best: int, best_metric: str):
        """Removes what an interrupted save has left behind."""
        directory = (workdir / layout.CHECKPOINTS).absolute()
        self._best_metric = best_metric
        self._policy = _KeepLastAndBest(keep_last, keep_best)
        for path in _all(directory):
            self._note_score(Origin("own", path).record())
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, state: TrainState, record: Record) -> None:
        """Save in the background; returns once the state is copied off the devices and may be donated.

        A step that is already saved is left as it is. Every process calls this.
        """
        self._note_score(record)
        if record.step in self._manager.all_steps():
            return
        self._manager.save(
            record.step,
            args=ocp.args.Composite(
                **{_STATE: ocp.args.PyTreeSave(state), _RECORD: ocp.args.JsonSave(record.to_json())}
            ),
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        """Wait until the last save is complete."""
        self._manager.close()

    def _note_score(self, record: Record) -> None:
        if record.last is not None and record.evaluated:
            self._policy.scores[record.step] = record.last.values[self._best_metric]


@dataclasses.dataclass
class _KeepLastAndBest(PreservationPolicy):
    keep_last: int
    keep_best: int
    scores: dict[int, float] = dataclasses.field(default_factory=dict)  # step -> held-out metric

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        del context
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        scored = [step for step in steps if math.isfinite(self.scores.get(step, math.nan))]
        best = sorted(scored, key=lambda step: self.scores[step])[: self.keep_best]
        keep = {*steps[max(len(steps) - self.keep_last, 0) :], *best}
        return [checkpoint.step in keep for checkpoint in checkpoints]
