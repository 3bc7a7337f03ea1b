"""The train state: all arrays that a step reads and writes, laid out on the mesh."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ...optimizers.plan import patterns
from .. import optimizer
from ..sharding import meshes, placement
from ..task import BatchSpec, Task
from . import averaging, guard

FROZEN = "frozen"  # the collection of parameters that nothing changes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The input and output of a train step, and the content of a checkpoint.

    Attributes:
      step: int32 scalar, number of steps taken, including skipped steps; also the index of the next batch.
      params: parameters of the model. With `ema_decay` they are the average of the trained parameters.
      opt_state: state of the optimizer.
      model_state: collections of the task other than "params" and "frozen".
      guard: counters of the guard.
      averaging: with `ema_decay`, the trained variables and the weight of the average; else None.
      frozen: parameters that no step changes; None if the task has none.
    """

    step: Any
    params: Any
    opt_state: Any
    model_state: Any
    guard: Any
    averaging: Any = None
    frozen: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """All variables as one dict, as the task takes them."""
        return {**self.changing, **self.fixed}

    @property
    def fixed(self) -> dict[str, Any]:
        """The variables that no step changes."""
        return {} if self.frozen is None else {FROZEN: self.frozen}

    @property
    def changing(self) -> dict[str, Any]:
        """Parameters and model state."""
        return {"params": self.params, **self.model_state}

    @property
    def trained(self) -> dict[str, Any]:
        """The variables that the optimizer trains: the iterate, or without an average those that change."""
        return self.averaging.iterate if self.averaging else self.changing


def abstract_variables(task: Task, batch_spec: BatchSpec) -> dict[str, Any]:
    """Return shapes and dtypes of the task's variables. Nothing is computed."""
    return jax.eval_shape(lambda: task.init(jax.random.key(0), batch_spec))


def abstract_state(
    variables: dict[str, Any],
    tx: optax.GradientTransformation,
    placements: dict[str, placement.Placement],
    mesh: Mesh,
    ema_decay: float = 0.0,
) -> TrainState:
    """Return the train state as ShapeDtypeStructs with shardings.

    Args:
      variables: from `abstract_variables`.
      tx: the optimizer.
      placements: sharding of each variable, by path. The step, the guard and the weight of the average are replicated.
      mesh: the mesh.
      ema_decay: decay of the average of the parameters; 0 keeps none.
    """
    variables = _with_shardings(variables, placement.shardings(variables, placements, mesh))
    replicated = meshes.replicated(mesh)
    frozen = variables.pop(FROZEN, None)
    weight = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
    averages = averaging.Averaging(dict(variables), weight) if ema_decay else None
    params = variables.pop("params")
    opt_state = _with_shardings(jax.eval_shape(tx.init, params), optimizer.state_shardings(tx, params, mesh))
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
        params=params,
        opt_state=opt_state,
        model_state=variables,
        guard=jax.tree.map(lambda leaf: leaf.update(sharding=replicated), jax.eval_shape(guard.initial)),
        averaging=averages,
        frozen=frozen,
    )


def make_initial(
    task: Task,
    tx: optax.GradientTransformation,
    batch_spec: BatchSpec,
    abstract: TrainState,
    seed: int,
    names: Collection[str],
) -> jax.stages.Wrapped:
    """Return the jitted `() -> arrays` of the initial state whose paths are in `names`. The others take no memory.

    Each device computes its shards; values are the same on every mesh.
    """

    def initial() -> dict[str, Any]:
        # Steps fold in 0, 1, 2, ... and never reach this number.
        variables = dict(task.init(jax.random.fold_in(jax.random.key(seed), 2**32 - 1), batch_spec))
        frozen = variables.pop(FROZEN, None)
        # Copied, because the step donates the variables and the iterate.
        iterate = jax.tree.map(jnp.copy, variables)
        params = variables.pop("params")
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=tx.init(params),
            model_state=variables,
            guard=guard.initial(),
            averaging=averaging.Averaging(iterate, jnp.zeros(())) if abstract.averaging else None,
            frozen=frozen,
        )
        return chosen(state)

    def chosen(state: Any) -> dict[str, Any]:
        found = zip(patterns.paths(state), jax.tree.leaves(state), strict=True)
        return {name: leaf for name, leaf in found if name in names}

    return jax.jit(initial if names else dict, out_shardings=chosen(shardings(abstract)))


def shardings(abstract: Any) -> Any:
    """Return the shardings of a tree of ShapeDtypeStructs or arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _with_shardings(tree: Any, tree_shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), tree, tree_shardings)
