"""What the trainer asks of an optimizer beyond optax's contract, with an answer for those that offer no more.

An optimizer is an `optax.GradientTransformation`. It may also have `state_shardings(params)`, `diagnostics(state)` and
`treatments(params)`; and, if the layout of its state depends on the number of devices, `state_of_owners(params, n)` and
`adopt(state, params)`; and, if part of its work is done outside the step, `host_roots(params)`, which gives the service
that does it or None. Distributed Shampoo has them all, plain optax has none.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import optax
from jax.sharding import Mesh

from ..optimizers import patterns
from ..optimizers.host import HostRootsError as ServiceError
from . import partitioning

__all__ = ["OptimizerOptions", "Service", "ServiceError"]


class OptimizerOptions(Protocol):
    """The options of an optimizer, a frozen dataclass: what the config's `optimizer` section names."""

    def build(
        self, learning_rate: optax.Schedule, *, mesh: Mesh | None, axis_names: Any, param_specs: Any
    ) -> optax.GradientTransformation:
        """The optimizer for parameters that lie on `mesh` as `param_specs` say, dimensions named by `axis_names`."""
        ...


@runtime_checkable
class _Shards(Protocol):
    def state_shardings(self, params: Any) -> Any: ...


@runtime_checkable
class _Diagnoses(Protocol):
    def diagnostics(self, state: Any) -> dict[str, jax.Array]: ...


@runtime_checkable
class _Treats(Protocol):
    def treatments(self, params: Any) -> dict[str, str]: ...


@runtime_checkable
class _Partitions(Protocol):
    def state_of_owners(self, params: Any, owners: int) -> Any: ...

    def adopt(self, state: Any, params: Any) -> Any: ...


@runtime_checkable
class _Serves(Protocol):
    def host_roots(self, params: Any) -> "Service | None": ...


class Service(Protocol):
    """What an optimizer does on the host, around the steps; all that it is given and returns is optimizer state."""

    def start(self, state: Any) -> Any:
        """Before the first step: begin, or go on with what `with_in_flight` has added to the state."""
        ...

    def install(self, state: Any) -> Any:
        """Before every step; raises ServiceError, the state being as it was."""
        ...

    def take(self, state: Any) -> None:
        """After every step, before the state is donated."""
        ...

    def with_in_flight(self, state: Any) -> Any:
        """The state as a checkpoint holds it."""
        ...

    def metrics(self) -> dict[str, float]:
        """Numbers to be reported, by name."""
        ...

    def complaint(self) -> str | None:
        """What a person should hear of since this was asked last, if anything."""
        ...

    def close(self) -> None:
        """End, without waiting for work that is under way."""
        ...


class _NoService:
    """Of an optimizer that does everything in the step."""

    def start(self, state: Any) -> Any:
        return state

    def install(self, state: Any) -> Any:
        return state

    def take(self, state: Any) -> None:
        pass

    def with_in_flight(self, state: Any) -> Any:
        return state

    def metrics(self) -> dict[str, float]:
        return {}

    def complaint(self) -> None:
        return None

    def close(self) -> None:
        pass


def service(tx: optax.GradientTransformation, params: Any) -> Service:
    """The optimizer's work outside the step."""
    found = tx.host_roots(params) if isinstance(tx, _Serves) else None
    return found or _NoService()


def state_shardings(tx: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
    """Where each array of the optimizer's state lies: a tree of NamedSharding shaped like `tx.init(params)`.

    Where the optimizer does not say, an array that mirrors a parameter (its path ends with the parameter's,
    its shape is the same: momenta, second moments) lies as the parameter does, and everything else is
    replicated.

    Args:
      tx: the optimizer.
      params: ShapeDtypeStructs with shardings.
      mesh: the mesh.
    """
    if isinstance(tx, _Shards):
        return tx.state_shardings(params)
    mirrored = dict(zip(patterns.paths(params), jax.tree.leaves(params), strict=True))

    def sharding(key_path, leaf):
        for start in range(len(key_path)):
            parameter = mirrored.get(patterns.path_name(key_path[start:]))
            if parameter is not None and parameter.shape == leaf.shape:
                return parameter.sharding
        return partitioning.replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(tx.init, params))


def diagnostics(tx: optax.GradientTransformation, state: Any) -> dict[str, jax.Array]:
    """Scalars about the optimizer (refreshes, failures, residuals), by name; `{}` where it has none."""
    return tx.diagnostics(state) if isinstance(tx, _Diagnoses) else {}


def treatments(tx: optax.GradientTransformation, params: Any) -> dict[str, str]:
    """A short text per parameter path on how the optimizer treats it; `{}` where it treats all alike."""
    return tx.treatments(params) if isinstance(tx, _Treats) else {}


def state_of_devices(tx: optax.GradientTransformation, abstract: Any, params: Any, devices: int) -> Any:
    """The optimizer's state as a run on `devices` devices has saved it: ShapeDtypeStructs with shardings here."""
    return tx.state_of_owners(params, devices) if isinstance(tx, _Partitions) else abstract


def adopt(tx: optax.GradientTransformation, state: Any, params: Any, mesh: Mesh) -> Any:
    """The state of a run on another mesh, as it was saved, laid out for this one."""
    if not isinstance(tx, _Partitions):
        return state
    own = jax.tree.map(lambda leaf: leaf.sharding, tx.state_of_owners(params, mesh.size))
    return jax.jit(lambda state: tx.adopt(state, params), out_shardings=own)(state)
