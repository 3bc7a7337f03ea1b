"""Run a step on the rows of tables that its batch uses, so that time and memory do not depend on the size of tables."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ...optimizers.plan import patterns
from .. import optimizer
from ..task import Batch, Sparse
from .state import TrainState

Step = Callable[[TrainState, Batch, Any], tuple[TrainState, Any]]

_TABLE, _OPTIMIZER = "table", "optimizer"
_Name = tuple[str, str]  # path of a table; one of these kinds


def on_used_rows(step: Step, task: Sparse, abstract: TrainState) -> Callable[[TrainState, Batch], Any]:
    """Return the function `(state, batch) -> (state, metrics)` that runs `step` on the used rows of the tables.

    Rows that the batch does not use keep their bits, and so does their state.

    Args:
      step: `(state, batch, usable) -> (state, metrics)`; it changes nothing if `usable` is False.
      task: has tables.
      abstract: shapes and shardings of the state.
    """
    shardings: dict[_Name, Any] = {name: x.sharding for name, x in _arrays(abstract, task.sparse).items()}
    axes = {path: _axes(shardings[path, _TABLE]) for path in task.sparse}

    def sparse_step(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        rows, batch, filled = task.used_rows(batch, axes)
        whole = _arrays(state, task.sparse)
        some = {name: _taken(x, rows[name[0]], shardings[name]) for name, x in whole.items()}
        state, metrics = step(_with_arrays(state, some), batch, filled <= 1)
        some = _arrays(state, task.sparse)
        whole = {name: _put(x, rows[name[0]], some[name], shardings[name]) for name, x in whole.items()}
        return _with_arrays(state, whole), metrics

    return sparse_step


def _arrays(state: TrainState, paths: Collection[str]) -> dict[_Name, jax.Array]:
    """Return the tables of a state, and what the optimizer keeps for their rows."""
    params = zip(patterns.paths(state.params), jax.tree.leaves(state.params), strict=True)
    kinds = {_TABLE: dict(params), _OPTIMIZER: optimizer.row_states(state.opt_state)}
    return {(path, kind): arrays[path] for kind, arrays in kinds.items() for path in paths}


def _with_arrays(state: TrainState, arrays: Mapping[_Name, jax.Array]) -> TrainState:
    paths = patterns.path_tree(state.params)
    return dataclasses.replace(
        state,
        params=jax.tree.map(lambda x, path: arrays.get((path, _TABLE), x), state.params, paths),
        opt_state=optimizer.with_row_states(
            state.opt_state, {path: x for (path, kind), x in arrays.items() if kind == _OPTIMIZER}
        ),
    )


def _axes(sharding: NamedSharding) -> tuple[str, ...]:
    """Return the axes of more than one device that share the rows."""
    first = sharding.spec[0] if len(sharding.spec) else None
    names = first if isinstance(first, tuple) else (first,) if first else ()
    return tuple(name for name in names if sharding.mesh.shape[name] > 1)


def _taken(x_Rx: jax.Array, rows_n: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Return the rows of an array with these numbers, and zeros for a number beyond its end."""

    def local(own: jax.Array, rows: jax.Array, first: jax.Array | int = 0) -> jax.Array:
        return own.at[rows - first].get(mode="fill", fill_value=0)

    return _by_device(local, sharding)(x_Rx, rows_n)


def _put(x_Rx: jax.Array, rows_n: jax.Array, new_nx: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Return the array with some rows replaced."""

    def local(own: jax.Array, rows: jax.Array, new: jax.Array, first: jax.Array | int = 0) -> jax.Array:
        return own.at[rows - first].set(new, mode="drop")

    return _by_device(local, sharding)(x_Rx, rows_n, new_nx)


def _by_device(local: Callable[..., jax.Array], sharding: NamedSharding) -> Callable[..., jax.Array]:
    """Return the function of (array, rows, ...) that runs where the rows are; `first` is the first row of a device."""
    axes = _axes(sharding)
    if not axes:
        return local

    def on_device(own: jax.Array, rows: jax.Array, *others: jax.Array) -> jax.Array:
        return local(own, rows, *others, first=lax.axis_index(axes) * len(own))

    def run(x: jax.Array, rows: jax.Array, *others: jax.Array) -> jax.Array:
        specs = sharding.spec, PartitionSpec(axes), *[sharding.spec] * len(others)
        return jax.shard_map(on_device, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec, check_vma=False)(
            x, rows, *others
        )

    return run
