"""Compile the functions of a run in background threads."""

import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, wait
from typing import Any

import jax

from .compiler_options import compile_with
from .program import Program

_LAST = ("evaluate", "predict")


class Steps:
    """The compiled functions of a run, by name; `steps[name]` waits until that function is compiled.

    "initial", "train" and "diagnose" are compiled first. "evaluate" and "predict" follow once "train" is compiled, so
    that the first step does not share its processor cores with them.

    Args:
      initial: jitted () -> arrays of the first state.
      program: the other functions. All are traced here, with the mesh that `jax.set_mesh` has made current.
      threads: compile; at least two.

    Raises:
      UserError: the task refuses the batch.
    """

    def __init__(self, initial: jax.stages.Wrapped, program: Program, threads: Executor):
        self._compiled: dict[str, Future[Any]] = {}
        for name, lowered in itertools.chain([("initial", initial.lower())], program.lower()):
            earlier = [self._compiled["train"]] if name in _LAST else []
            self._compiled[name] = threads.submit(_compile, lowered, program.compiler_options, earlier)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self._compiled[name].result()

    def wait(self) -> None:
        """Wait until all functions are compiled. An error of the compiler is raised."""
        for each in self._compiled.values():
            each.result()


def _compile(lowered: jax.stages.Lowered, options: Mapping[str, str], earlier: list[Future[Any]]) -> Any:
    wait(earlier)
    return compile_with(lowered, options)
