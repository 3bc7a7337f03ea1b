"""Base of tasks with an NNX module: the adapter between modules that hold their arrays and a trainer that passes them.

The module is split into its parameters, collection "params", and its other arrays (batch statistics, counters),
collection "state", and merged again inside every trace. Its random streams belong to neither: they restart from the key
of each step, so that a resumed run draws the same numbers. Values that modules `sow` are not kept.
"""

import abc
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from .linen_task import Batch, BatchSpec, Metrics

Path = tuple[Any, ...]  # of an array in a module: names, and indices in lists


class NNXTask(abc.ABC):
    """Base of a frozen dataclass that names an NNX module and measures it; it derives the methods of a task.

    Logical axis names come from the module's metadata, `nnx.with_partitioning(init, ("embed", "mlp"))`; arrays without
    names have None for every dimension and are replicated.
    """

    @abc.abstractmethod
    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Return the initial module, a function of the task's fields and `rngs` alone."""

    @abc.abstractmethod
    def measure(self, module: Any, batch: Batch, *, train: bool) -> Metrics:
        """Return (total, weight) by name, float32 scalars, of the module on a batch; pure except for the module.

        metrics["loss"] is required; training lowers its total / weight. Padding examples are all zeros and must have no
        weight.

        Args:
          module: in training mode (`module.train()`), or in evaluation mode if `train` is False.
          batch: arrays [B, ...].
          train: whether a gradient is taken.
        """

    @abc.abstractmethod
    def flops(self, batch_spec: BatchSpec) -> float:
        """Return the floating-point operations of one training step on one batch: three times the forward pass."""

    def init(self, key: jax.Array, batch_spec: BatchSpec) -> dict[str, Any]:
        """Return {"params": {...}} and, if the module holds other arrays, {"state": {...}}."""
        del batch_spec
        leaves = nnx.to_flat_state(self._split(key)[1])
        return _collections({tuple(path): (leaf, leaf.get_value()) for path, leaf in leaves})

    def loss(
        self, variables: dict[str, Any], batch: Batch, *, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[dict[str, Any], Metrics]]:
        """Return `(loss, (new_model_state, metrics))` of one batch.

        Raises:
          ValueError: `measure` returns no metric "loss".
        """
        module = self.assemble(variables, key=key, train=train)
        with nnx.use_eager_sharding(False):
            metrics = self.measure(module, batch, train=train)
        if "loss" not in metrics:
            given = ", ".join(metrics) or "nothing"
            raise ValueError(f"{type(self).__name__}.measure returns {given} and no 'loss'. Add it.")
        total, weight = metrics["loss"]
        left = dict(nnx.to_flat_state(nnx.state(module)))
        after = {path: (leaf, left[path].get_value()) for path, leaf in self._abstract()[1].items()}
        model_state = {name: arrays for name, arrays in _collections(after).items() if name != "params"}
        return total / weight, (model_state, metrics)

    def logical_axes(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the names in the module's metadata, one for each dimension, or None."""
        names = _collections({path: (leaf, _names(leaf)) for path, leaf in self._abstract()[1].items()})
        return jax.tree.map(lambda _, axes: axes, variables, names)

    def assemble(self, variables: dict[str, Any], *, key: jax.Array, train: bool = False) -> Any:
        """Return the module with the given arrays and random streams from `key`, in training or evaluation mode.

        Args:
          variables: from `init` or a checkpoint.
          key: key of dropout and similar; most modules do not use it in evaluation mode.
          train: selects the mode.
        """
        graph, leaves = self._abstract()
        state = []
        for number, (path, leaf) in enumerate(leaves.items()):
            if isinstance(leaf, nnx.RngKey):
                shape = leaf.get_value().shape  # scanned or vmapped layers have a stack of keys
                value = jax.random.split(jax.random.fold_in(key, number), shape)
            elif isinstance(leaf, nnx.RngState):
                value = jax.numpy.zeros(leaf.get_value().shape, leaf.get_value().dtype)
            else:
                value = variables[_collection(leaf)]
                for name in path:
                    value = value[str(name)]
            state.append((path, leaf.replace(value)))
        with nnx.use_eager_sharding(False):
            module = nnx.merge(graph, nnx.from_flat_state(state))
        module.train() if train else module.eval()
        return module

    def _abstract(self) -> tuple[Any, dict[Path, nnx.Variable]]:
        """Return the split module, with shapes in place of arrays."""
        graph, state = jax.eval_shape(self._split, jax.random.key(0))
        return graph, {tuple(path): leaf for path, leaf in nnx.to_flat_state(state)}

    def _split(self, key: jax.Array) -> tuple[Any, Any]:
        # NNX would shard new arrays at once over the mesh in the context, whose axes the logical names are not.
        with nnx.use_eager_sharding(False):
            return nnx.split(self.module(nnx.Rngs(key)))


def _collection(leaf: nnx.Variable) -> str:
    return "params" if isinstance(leaf, nnx.Param) else "state"


def _collections(leaves: Mapping[Path, tuple[nnx.Variable, Any]]) -> dict[str, Any]:
    """Return nested dicts by collection of a value for each variable; indices in lists become keys "0", "1", ..."""
    result: dict[str, Any] = {"params": {}}
    for path, (leaf, value) in leaves.items():
        if isinstance(leaf, nnx.RngState):
            continue
        inner = result.setdefault(_collection(leaf), {})
        for name in path[:-1]:
            inner = inner.setdefault(str(name), {})
        inner[str(path[-1])] = value
    return result


def _names(leaf: nnx.Variable) -> tuple[str | None, ...]:
    return tuple(leaf.get_metadata().get("out_sharding") or (None,) * len(leaf.get_value().shape))
