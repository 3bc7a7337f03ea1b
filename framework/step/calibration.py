"""What an optimizer's options leave to measurement: decided at the start of a run, kept in its workdir.

Options may have `undecided`, `without_roots()`, `decide(tx, params, step_seconds)` and `decided(choice)`.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import optax

from ..base import workdir as layout
from ..base.errors import UserError
from ..base.json_files import read_object
from ..distributed import agreement
from ..distributed.console import say
from .state import TrainState

_STEPS = 5

# Options -> the optimizer, the layout of the state, the train step.
Assemble = Callable[[Any], tuple[optax.GradientTransformation, TrainState, jax.stages.Wrapped]]


@runtime_checkable
class _MayBeUndecided(Protocol):
    @property
    def undecided(self) -> bool: ...

    def without_roots(self) -> Any: ...

    def decide(self, tx: Any, params: Any, step_seconds: float) -> dict[str, Any]: ...

    def decided(self, choice: Any) -> Any: ...


def settle(
    options: Any,
    workdirs: Sequence[Path],
    assemble: Assemble,
    initial_state: Callable[[optax.GradientTransformation, TrainState], TrainState],
    batch: Any,
) -> tuple[Any, dict[str, Any] | None]:
    """(options with nothing left open; what was decided, or None where nothing was open).

    Args:
      options: of the optimizer.
      workdirs: a decision that one of them holds is taken over, of the first that does.
      assemble: what is timed.
      initial_state: (optimizer, layout) -> the state before the first step.
      batch: of training data, on the devices.

    Raises:
      UserError: a workdir's file of the decision holds something else.
    """
    if not isinstance(options, _MayBeUndecided) or not options.undecided:
        return options, None
    for path in (workdir / layout.SCHEDULE for workdir in workdirs):
        choice = read_object(path)
        if choice is not None:
            return _decided(options, choice, path), choice
    say("measuring what roots cost, to choose when they are refreshed ...")
    tx, abstract, train_step = assemble(options.without_roots())
    seconds = _step_seconds(train_step, initial_state(tx, abstract), batch)
    choice = agreement.first(lambda: options.decide(tx, abstract.params, seconds))
    say(choice["reason"])
    return options.decided(choice), choice


def _decided(options: _MayBeUndecided, choice: dict[str, Any], path: Path) -> Any:
    try:
        say(str(choice["reason"]))
        return options.decided(choice)
    except (KeyError, TypeError, ValueError) as error:
        words = " ".join(str(error).split())
        raise UserError(
            f"{path} is no choice of a schedule ({words}); restore it, or remove it to measure anew"
        ) from error


def keep(workdir: Path, choice: dict[str, Any] | None) -> None:
    """Write a decision where a resumed run finds it."""
    if choice is not None and jax.process_index() == 0:
        (workdir / layout.SCHEDULE).write_text(json.dumps(choice, indent=2) + "\n")


def _step_seconds(train_step: jax.stages.Wrapped, state: TrainState, batch: Any) -> float:
    """The median of a few steps after the one that compiles; the state is donated."""
    state, _ = jax.block_until_ready(train_step(state, batch))
    taken = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(train_step(state, batch))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
