"""What the trainer asks of an optimizer beyond optax's contract, with an answer for those that offer no more.

An optimizer is an `optax.GradientTransformation`. It may also have `state_shardings(params)`, `diagnostics(state)` and
`treatments(params)`; and, if the layout of its state depends on more than the parameters, `saved_spec(params)`,
`manifest(params)` and `inheritance(params, manifest, shapes, renamed)`; and, if part of its work is done outside the
step, `host_roots(params)`, which gives the service that does it or None. Distributed Shampoo has them all, plain optax
has none.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import optax
from jax.sharding import Mesh

from ..optimizers.checkpoint.inheritance import Fresh, Kept, Source
from ..optimizers.host.service import HostRootsError as ServiceError
from ..optimizers.plan import patterns
from .sharding import meshes

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


class Inheritance(Protocol):
    """What a new state takes over from a saved one."""

    def source(self, name: str, shape: tuple[int, ...]) -> Source:
        """Where an array of the state comes from; `name` is its path in the state."""
        ...

    def report(self) -> dict[str, dict[str, str]]:
        """Path of a parameter -> part of its state -> "" where it is taken over, or why it is not."""
        ...

    def notes(self) -> list[str]:
        """What else a person should know."""
        ...


@runtime_checkable
class _Describes(Protocol):
    def saved_spec(self, params: Any) -> Any: ...

    def manifest(self, params: Any) -> dict[str, Any]: ...

    def inheritance(
        self, params: Any, manifest: Any, shapes: Mapping[str, tuple[int, ...]], renamed: Callable[[str], str]
    ) -> Inheritance: ...


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
        return meshes.replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(tx.init, params))


def diagnostics(tx: optax.GradientTransformation, state: Any) -> dict[str, jax.Array]:
    """Scalars about the optimizer (refreshes, failures, residuals), by name; `{}` where it has none."""
    return tx.diagnostics(state) if isinstance(tx, _Diagnoses) else {}


def treatments(tx: optax.GradientTransformation, params: Any) -> dict[str, str]:
    """A short text per parameter path on how the optimizer treats it; `{}` where it treats all alike."""
    return tx.treatments(params) if isinstance(tx, _Treats) else {}


def saved_spec(tx: optax.GradientTransformation, abstract: Any, params: Any) -> Any:
    """The optimizer's state as a checkpoint holds it: ShapeDtypeStructs with shardings."""
    return tx.saved_spec(params) if isinstance(tx, _Describes) else abstract


def manifest(tx: optax.GradientTransformation, params: Any) -> dict[str, Any]:
    """What a checkpoint says of the optimizer's state beside its arrays, as JSON."""
    return tx.manifest(params) if isinstance(tx, _Describes) else {}


def inheritance(
    tx: optax.GradientTransformation,
    params: Any,
    manifest: Any,
    shapes: Mapping[str, tuple[int, ...]],
    renamed: Callable[[str], str],
) -> Inheritance:
    """What the optimizer's state takes over from one that an optimizer of the same name has saved.

    Args:
      tx: the optimizer.
      params: its parameters, ShapeDtypeStructs with shardings.
      manifest: what `manifest` gave for the saved state.
      shapes: name -> shape of the arrays that were saved.
      renamed: gives a saved parameter's path its name of today.

    Raises:
      ValueError: the manifest is none.
    """
    if isinstance(tx, _Describes):
        return tx.inheritance(params, manifest, shapes, renamed)
    return _ByName(params, jax.eval_shape(tx.init, params), shapes, renamed)


class _ByName:
    """State whose arrays are known by their names, which end with those of parameters where they belong to one."""

    def __init__(
        self, params: Any, abstract: Any, shapes: Mapping[str, tuple[int, ...]], renamed: Callable[[str], str]
    ):
        self._shapes = shapes
        self._saved = {_renamed_end(name, renamed): name for name in shapes}
        self._report: dict[str, dict[str, str]] = {path: {} for path in patterns.paths(params)}
        self._notes: list[str] = []
        for name, leaf in zip(patterns.paths(abstract), jax.tree.leaves(abstract), strict=True):
            source = self.source(name, leaf.shape)
            why = source.why if isinstance(source, Fresh) else ""
            owners = [path for path in self._report if name.endswith(f"/{path}")]
            for path in owners:
                self._report[path][name[: -len(path) - 1]] = why
            if why and not owners:
                self._notes.append(f"{name} of the optimizer: initialised ({why})")

    def source(self, name: str, shape: tuple[int, ...]) -> Source:
        saved = self._saved.get(name)
        if saved is None:
            return Fresh("there is none")
        if self._shapes[saved] != shape:
            return Fresh(f"of shape {list(self._shapes[saved])} there, {list(shape)} here")
        return Kept(saved)

    def report(self) -> dict[str, dict[str, str]]:
        return self._report

    def notes(self) -> list[str]:
        return self._notes


def _renamed_end(name: str, renamed: Callable[[str], str]) -> str:
    """The longest end of a name that is renamed, renamed."""
    parts = name.split("/")
    for start in range(len(parts)):
        end = "/".join(parts[start:])
        if renamed(end) != end:
            return "/".join([*parts[:start], renamed(end)])
    return name
