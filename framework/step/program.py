"""All that a config computes on a mesh: the layout of the state, and the functions of a run, not yet compiled."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from ..base.errors import UserError
from ..optimizer import OptimizerOptions, expect_service
from ..sharding import placement
from ..task import BatchSpec, Task, judge_of
from . import compiler_options, refusals
from .state import abstract_state, abstract_variables
from .steps import make_diagnosis, make_eval_step, make_predict_step, make_train_step

_MOST_PARAMETERS = 1e13  # of more, the plan of an optimizer alone does not fit into memory


class Program:
    """The program of a config on a mesh, which `jax.set_mesh` has made current. Nothing of it is computed or compiled.

    Args:
      config: the config.
      task: the model.
      options: of the optimizer.
      mesh: the mesh.
      batch_spec: shapes of a global batch, with shardings.
      learning_rate: function of the number of accepted steps of the run.
      began: number of accepted steps before the first step of this optimizer.

    Attributes:
      placements: sharding of each variable, by path.
      tx: the optimizer.
      abstract: the train state as ShapeDtypeStructs with shardings.
      train_step: jitted (state, batch) -> (state, metrics).
      eval_step: jitted (variables, batch) -> sums of metrics.
      predict_step: jitted (variables, batch) -> predictions; None for a task that judges no predictions.
      diagnose: jitted optimizer state -> diagnostics.
      compiler_options: options of XLA for these functions.

    Raises:
      UserError: the task refuses the batch or the mesh, the sharding rules do not cover its logical axes, or the
        optimizer refuses the parameters.
    """

    def __init__(
        self,
        config: Any,
        task: Task,
        options: OptimizerOptions,
        mesh: Mesh,
        batch_spec: BatchSpec,
        learning_rate: optax.Schedule,
        *,
        began: int = 0,
    ):
        self.task, self.batch_spec = task, batch_spec
        self.compiler_options = compiler_options.choose(config.compiler_options, mesh.devices.flat[0])
        with refusals.of(task):
            variables = abstract_variables(task, batch_spec)
            axes = task.logical_axes(variables)
        if (count := sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))) > _MOST_PARAMETERS:
            raise UserError(
                f"config.task: has {count:.3g} parameters. Use sizes that make at most {_MOST_PARAMETERS:g}."
            )
        self.placements = placement.place_all(variables, axes, config.sharding_rules, mesh)
        specs = placement.shardings(variables, self.placements, mesh)["params"]
        with refusals.of():
            self.tx = tx = options.build(
                lambda count: learning_rate(count + began), mesh=mesh, axis_names=axes["params"], param_specs=specs
            )
            expect_service(tx, variables["params"])
            self.abstract = abstract = abstract_state(variables, tx, self.placements, mesh, config.ema_decay)
            knobs = {name: config[name] for name in ("seed", "microbatches", "gradient_clip", "ema_decay")}
            self.train_step = make_train_step(task, tx, learning_rate, abstract, mesh, **knobs)
        self.diagnose = make_diagnosis(abstract, mesh)
        self.eval_step = make_eval_step(task, abstract.variables, mesh, config.microbatches)
        judge = judge_of(task)
        self.predict_step = make_predict_step(judge, abstract.variables, mesh, config.microbatches) if judge else None

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
