"""An NNX module as a task: the adapter between modules that hold their arrays and a trainer that passes them.

The trainer sees what it sees of any task, pure functions on nested dicts of arrays. A module is taken apart into its
parameters, collection "params", and what else it holds (batch statistics, counters), collection "state"; it is put
together again inside every trace. Its random streams belong to neither: they start anew from the key of each step, so
that a resumed run draws the same numbers. What modules `sow` is not kept.
"""

import abc
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

Batch = Mapping[str, jax.Array]
BatchSpec = Mapping[str, jax.ShapeDtypeStruct]
Metrics = dict[str, tuple[jax.Array, jax.Array]]
Path = tuple[Any, ...]  # of an array in a module: names, and places in lists


class NNXTask(abc.ABC):
    """Base of a frozen dataclass that names an NNX module and measures it; the rest of a task follows from these.

    Logical axis names are those of the module's own metadata, `nnx.with_partitioning(init, ("embed", "mlp"))`;
    arrays without have None for every dimension and lie whole on every device.
    """

    @abc.abstractmethod
    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module at the start of training: a function of the task's fields and of `rngs` alone."""

    @abc.abstractmethod
    def measure(self, module: Any, batch: Batch, *, train: bool) -> Metrics:
        """What the module makes of a batch: (total, weight) by name, float32 scalars; pure but for the module.

        metrics["loss"] is required; its total / weight is what training lowers. Examples that only fill up a batch are
        all zeros and must have no weight.

        Args:
          module: in training mode (`module.train()`), or in evaluation mode where `train` is False.
          batch: arrays [B, ...].
          train: whether a gradient is taken.
        """

    @abc.abstractmethod
    def flops(self, batch_spec: BatchSpec) -> float:
        """Floating-point operations of one training step on one batch: three times the forward pass."""

    def init(self, key: jax.Array, batch_spec: BatchSpec) -> dict[str, Any]:
        """{"params": {...}} and, if the module holds other arrays than parameters, {"state": {...}}; float32 or own."""
        del batch_spec
        leaves = nnx.to_flat_state(self._take_apart(key)[1])
        return _collections({tuple(path): (leaf, leaf.get_value()) for path, leaf in leaves})

    def loss(
        self, variables: dict[str, Any], batch: Batch, *, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[dict[str, Any], Metrics]]:
        """`(loss, (new_model_state, metrics))` of one batch; the model state is what the module holds afterwards.

        Raises:
          ValueError: there is no metric "loss".
        """
        module = self.assemble(variables, key=key, train=train)
        with nnx.use_eager_sharding(False):
            metrics = self.measure(module, batch, train=train)
        if "loss" not in metrics:
            raise ValueError(f"{type(self).__name__}.measure gives {', '.join(metrics) or 'nothing'} and no 'loss'")
        total, weight = metrics["loss"]
        left = dict(nnx.to_flat_state(nnx.state(module)))
        after = {path: (leaf, left[path].get_value()) for path, leaf in self._abstract()[1].items()}
        model_state = {name: arrays for name, arrays in _collections(after).items() if name != "params"}
        return total / weight, (model_state, metrics)

    def logical_axes(self, variables: dict[str, Any]) -> dict[str, Any]:
        """The names in the module's metadata, one for each dimension, None where it has none."""
        names = _collections({path: (leaf, _names(leaf)) for path, leaf in self._abstract()[1].items()})
        return jax.tree.map(lambda _, axes: axes, variables, names)

    def assemble(self, variables: dict[str, Any], *, key: jax.Array, train: bool = False) -> Any:
        """The module with the given arrays, its random streams begun from `key`, in training or evaluation mode.

        Args:
          variables: of `init`, or from a checkpoint.
          key: of dropout and the like; in evaluation mode most modules have no use for it.
          train: the mode.
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
        """The module taken apart, with shapes in place of arrays."""
        graph, state = jax.eval_shape(self._take_apart, jax.random.key(0))
        return graph, {tuple(path): leaf for path, leaf in nnx.to_flat_state(state)}

    def _take_apart(self, key: jax.Array) -> tuple[Any, Any]:
        # Logical names are no axes of the mesh in the context, on which NNX would lay new arrays at once.
        with nnx.use_eager_sharding(False):
            return nnx.split(self.module(nnx.Rngs(key)))


def _collection(leaf: nnx.Variable) -> str:
    return "params" if isinstance(leaf, nnx.Param) else "state"


def _collections(leaves: Mapping[Path, tuple[nnx.Variable, Any]]) -> dict[str, Any]:
    """Nested dicts by collection of what is given for each variable; lists of modules have "0", "1", ... for keys."""
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
