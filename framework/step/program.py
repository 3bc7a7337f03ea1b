"""All that a config computes on a mesh: the layout of the state, and the functions of a run, not yet compiled."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from ..base.errors import UserError
from ..optimizer import OptimizerOptions
from ..sharding import placement
from ..task import BatchSpec, Task, judge_of
from . import refusals
from .schedule import Schedule
from .state import TrainState, abstract_state, abstract_variables
from .steps import make_diagnosis, make_eval_step, make_predict_step, make_train_step

_MOST_PARAMETERS = 1e13  # of more, the plan of an optimizer alone does not fit into memory


@dataclasses.dataclass(frozen=True)
class Program:
    """The program of a config on a mesh. Nothing of it is computed or compiled.

    Attributes:
      task: the model.
      batch_spec: shapes of a global batch, with shardings.
      placements: sharding of each variable, by path.
      tx: the optimizer.
      abstract: the train state as ShapeDtypeStructs with shardings.
      train_step: jitted (state, batch) -> (state, metrics).
      eval_step: jitted (variables, batch) -> sums of metrics.
      predict_step: jitted (variables, batch) -> predictions; None for a task that judges no predictions.
      diagnose: jitted optimizer state -> diagnostics.
    """

    task: Task
    batch_spec: BatchSpec
    placements: dict[str, placement.Placement]
    tx: optax.GradientTransformation
    abstract: TrainState
    train_step: jax.stages.Wrapped
    eval_step: jax.stages.Wrapped
    predict_step: jax.stages.Wrapped | None
    diagnose: jax.stages.Wrapped

    @classmethod
    def of(
        cls,
        config: Any,
        task: Task,
        options: OptimizerOptions,
        mesh: Mesh,
        batch_spec: BatchSpec,
        learning_rate: Schedule,
        *,
        began: int = 0,
    ) -> "Program":
        """Lay out the state of a config on a mesh, which `jax.set_mesh` has made current.

        Args:
          config: the config.
          task: the model.
          options: of the optimizer.
          mesh: the mesh.
          batch_spec: shapes of a global batch, with shardings.
          learning_rate: function of the number of accepted steps of the run.
          began: number of accepted steps before the first step of this optimizer.

        Raises:
          UserError: the task refuses the batch or the mesh, the sharding rules do not cover its logical axes, or the
            optimizer refuses the parameters.
        """
        with refusals.of(task):
            variables = abstract_variables(task, batch_spec)
            axes = task.logical_axes(variables)
        if (count := sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))) > _MOST_PARAMETERS:
            raise UserError(
                f"config.task: has {count:.3g} parameters. Use sizes that make at most {_MOST_PARAMETERS:g}."
            )
        placements = placement.place_all(variables, axes, config.sharding_rules, mesh)
        specs = placement.shardings(variables, placements, mesh)["params"]
        with refusals.of_any():
            tx = options.build(learning_rate.after(began), mesh=mesh, axis_names=axes["params"], param_specs=specs)
            abstract = abstract_state(task, tx, batch_spec, placements, mesh, config.ema_decay)
            train_step = make_train_step(
                task,
                tx,
                learning_rate,
                abstract,
                mesh,
                seed=config.seed,
                microbatches=config.microbatches,
                gradient_clip=config.gradient_clip,
                ema_decay=config.ema_decay,
            )
        judge = judge_of(task)
        return cls(
            task,
            batch_spec,
            placements,
            tx,
            abstract,
            train_step,
            make_eval_step(task, abstract, mesh, config.microbatches),
            make_predict_step(judge, abstract, mesh, config.microbatches) if judge else None,
            make_diagnosis(abstract, mesh),
        )

    def metrics(self) -> tuple[str, ...]:
        """Return the names of the held-out metrics that every evaluation measures."""
        with refusals.of(self.task):
            return tuple(jax.eval_shape(self.eval_step, self.abstract.variables, self.batch_spec))

    def lower(self) -> Iterator[tuple[str, jax.stages.Lowered]]:
        """Trace the functions in the order of need, so that the first can be compiled while the others are traced.

        Yields:
          Name and lowered function: "train", "diagnose", "evaluate", and "predict" if there is one.

        Raises:
          UserError: the task refuses the batch.
        """
        variables = self.abstract.variables
        arguments = {
            "train": (self.train_step, self.abstract, self.batch_spec),
            "diagnose": (self.diagnose, self.abstract.opt_state),
            "evaluate": (self.eval_step, variables, self.batch_spec),
            "predict": (self.predict_step, variables, self.batch_spec),
        }
        for name, (function, *specs) in arguments.items():
            if function is not None:
                with refusals.of(self.task):
                    lowered = function.lower(*specs)
                yield name, lowered
