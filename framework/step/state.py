"""The train state: everything a step reads and writes, a pytree of arrays laid out on the mesh."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ...optimizers.plan import patterns
from .. import optimizer
from ..sharding import partitioning
from ..task import BatchSpec, Task
from . import averaging, guard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a train step takes and returns, and what a checkpoint holds.

    Attributes:
      step: int32 scalar, steps taken, skipped ones included; the next batch is that of this number.
      params: of the model: what the optimizer trains or, with averaging, the average of that.
      opt_state: the optimizer's state.
      model_state: the task's collections other than "params".
      guard: what the guard has counted, and its statistics of the loss.
      averaging: what the optimizer trains where `params` are an average, and the average's weights; else None.
    """

    step: Any
    params: Any
    opt_state: Any
    model_state: Any
    guard: Any
    averaging: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """Params and model state in the form that the task takes."""
        return {"params": self.params, **self.model_state}


def abstract_variables(task: Task, batch_spec: BatchSpec) -> dict[str, Any]:
    """Shapes and types of the task's variables; nothing is computed."""
    return jax.eval_shape(lambda: task.init(jax.random.key(0), batch_spec))


def abstract_state(
    task: Task,
    tx: optax.GradientTransformation,
    batch_spec: BatchSpec,
    placements: dict[str, partitioning.Placement],
    mesh: Mesh,
    ema_decay: float = 0.0,
) -> TrainState:
    """The train state as ShapeDtypeStructs with shardings: what to compile for, initialise and restore.

    `placements` are those of the task's variables, by path. The step, the guard and the weights of an average are
    replicated.
    """
    variables = abstract_variables(task, batch_spec)
    variables = _with_shardings(variables, partitioning.shardings(variables, placements, mesh))
    replicated = partitioning.replicated(mesh)
    averages = averaging.abstract(dict(variables), ema_decay, replicated)
    params = variables.pop("params")
    opt_state = _with_shardings(jax.eval_shape(tx.init, params), optimizer.state_shardings(tx, params, mesh))
    scalars = jax.eval_shape(guard.initial)
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
        params=params,
        opt_state=opt_state,
        model_state=variables,
        guard=_with_shardings(scalars, jax.tree.map(lambda _: replicated, scalars)),
        averaging=averages,
    )


def initial_state(
    task: Task, tx: optax.GradientTransformation, batch_spec: BatchSpec, abstract: TrainState, seed: int
) -> TrainState:
    """The state before the first step: each device computes its part, with the same values on every mesh."""
    init = _initial(task, tx, batch_spec, abstract, seed)
    return jax.jit(init, out_shardings=shardings(abstract))()


def initial_arrays(
    task: Task,
    tx: optax.GradientTransformation,
    batch_spec: BatchSpec,
    abstract: TrainState,
    seed: int,
    names: Collection[str],
) -> dict[str, jax.Array]:
    """Some arrays of the initial state, by their paths in it; the others take no memory."""
    if not names:
        return {}
    init = _initial(task, tx, batch_spec, abstract, seed)

    def chosen(state: TrainState) -> dict[str, Any]:
        return {
            name: leaf
            for name, leaf in zip(patterns.paths(state), jax.tree.leaves(state), strict=True)
            if name in names
        }

    return jax.jit(lambda: chosen(init()), out_shardings=chosen(shardings(abstract)))()


def _initial(
    task: Task, tx: optax.GradientTransformation, batch_spec: BatchSpec, abstract: TrainState, seed: int
) -> Callable[[], TrainState]:
    def init() -> TrainState:
        # No step uses this key: steps fold in 0, 1, 2, ...
        variables = dict(task.init(jax.random.fold_in(jax.random.key(seed), 2**32 - 1), batch_spec))
        averages = averaging.initial(dict(variables), abstract.averaging)
        params = variables.pop("params")
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=tx.init(params),
            model_state=variables,
            guard=guard.initial(),
            averaging=averages,
        )

    return init


def shardings(abstract: Any) -> Any:
    """The shardings of a tree of ShapeDtypeStructs or arrays, as a tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _with_shardings(tree: Any, tree_shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        tree_shardings,
    )
