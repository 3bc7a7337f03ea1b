"""What a config computes on a mesh, before anything is computed: its arrays, where they lie, and its train step."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from ..base.errors import UserError
from ..optimizer import OptimizerOptions
from ..sharding import partitioning
from ..task import BatchSpec, Task, judge_of
from . import refusals
from .guard import GuardOptions
from .schedule import Schedule
from .state import TrainState, abstract_state, abstract_variables
from .steps import make_diagnosis, make_eval_step, make_predict_step, make_train_step


class Assembly(NamedTuple):
    """An optimizer for the parameters of a program.

    Attributes:
      tx: the optimizer.
      abstract: the train state as ShapeDtypeStructs with shardings.
      step: the jitted train step.
    """

    tx: Any
    abstract: TrainState
    step: jax.stages.Wrapped


@dataclasses.dataclass(frozen=True)
class Program:
    """A task's variables on a mesh.

    Attributes:
      config: of the run.
      task: of the config.
      mesh: the mesh.
      batch_spec: shapes of a global batch, with shardings.
      variables: shapes of the task's variables.
      axes: their logical axes.
      placements: where each lies, by path.
      shardings: the same as a tree.
    """

    config: Any
    task: Task
    mesh: Mesh
    batch_spec: BatchSpec
    variables: dict[str, Any]
    axes: dict[str, Any]
    placements: dict[str, partitioning.Placement]
    shardings: dict[str, Any]

    @classmethod
    def of(cls, config: Any, task: Task, mesh: Mesh, batch_spec: BatchSpec) -> "Program":
        """Lay the variables of a task over a mesh; `jax.set_mesh` has it in the context.

        Raises:
          UserError: the task refuses the batch or the mesh, or the config's rules do not cover its logical axes.
        """
        with refusals.of(task):
            variables = abstract_variables(task, batch_spec)
            axes = task.logical_axes(variables)
        placements = partitioning.place_all(variables, axes, config.sharding_rules, mesh)
        shardings = partitioning.shardings(variables, placements, mesh)
        return cls(config, task, mesh, batch_spec, variables, axes, placements, shardings)

    def assemble(self, options: OptimizerOptions, learning_rate: Schedule, *, began: int = 0) -> Assembly:
        """The optimizer, the layout of the state, and the train step.

        Args:
          options: of the optimizer.
          learning_rate: a function of the number of accepted steps of the run.
          began: how many of these lay behind the run when this optimizer began.

        Raises:
          UserError: the optimizer cannot work on these parameters.
        """
        config = self.config
        spikes = GuardOptions(config.guard.on_spike, config.guard.spike_factor, config.guard.spike_window)
        with _refusals():
            tx = options.build(
                learning_rate.after(began),
                mesh=self.mesh,
                axis_names=self.axes["params"],
                param_specs=self.shardings["params"],
            )
            abstract = abstract_state(self.task, tx, self.batch_spec, self.placements, self.mesh, config.ema_decay)
            step = make_train_step(
                self.task,
                tx,
                learning_rate,
                abstract,
                self.mesh,
                seed=config.seed,
                microbatches=config.microbatches,
                gradient_clip=config.gradient_clip,
                guard_options=spikes,
                ema_decay=config.ema_decay,
            )
        return Assembly(tx, abstract, step)

    def lower(self, assembly: Assembly) -> dict[str, jax.stages.Lowered]:
        """Lower all functions of a run, ready to compile.

        Returns:
          "train": (state, batch) -> (state, metrics). "diagnose": optimizer state -> diagnostics. "evaluate":
          (variables, batch) -> sums of metrics. "predict": (variables, batch) -> predictions, only for a task that
          judges predictions.

        Raises:
          UserError: the task refuses the batch.
        """
        tx, abstract, step = assembly
        of_variables = {"evaluate": make_eval_step(self.task, abstract, self.mesh, self.config.microbatches)}
        if judge := judge_of(self.task):
            of_variables["predict"] = make_predict_step(judge, abstract, self.mesh, self.config.microbatches)
        with refusals.of(self.task):
            return {
                "train": step.lower(abstract, self.batch_spec),
                "diagnose": make_diagnosis(tx, abstract, self.mesh).lower(abstract.opt_state),
                **{name: each.lower(abstract.variables, self.batch_spec) for name, each in of_variables.items()},
            }


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What an optimizer refuses of the parameters it is given is the user's to mend."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
