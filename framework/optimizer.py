"""The trainer's contract with an optimizer.

An optimizer is an `optax.GradientTransformation`, built by its options. It may have further methods, which the
functions of this module call; for an optimizer without a method they return a default:

    state_shardings(params)     tree of NamedSharding shaped like the state
    diagnostics(state)          scalars by name
    treatments(params)          path -> short text for the parameter table
    saved_spec(params), manifest(params), inheritance(params, manifest, shapes, renamed)
                                checkpoints of a state whose layout depends on more than the parameters
    host_roots(params)          a `Service` that works on the host beside the steps, or None

Distributed Shampoo has all of them, plain optax has none.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import optax
from jax.sharding import Mesh

from ..optimizers.checkpoint.inheritance import Fresh, Kept, Source
from ..optimizers.host.service import HostRootsError as ServiceError
from ..optimizers.plan import patterns
from .sharding import meshes

__all__ = ["OptimizerOptions", "Service", "ServiceError"]


class OptimizerOptions(Protocol):
    """Options of an optimizer: the frozen dataclass that the config's `optimizer` section names."""

    def build(
        self, learning_rate: optax.Schedule, *, mesh: Mesh | None, axis_names: Any, param_specs: Any
    ) -> optax.GradientTransformation:
        """Return the optimizer for parameters on `mesh` with `param_specs` and dimensions named by `axis_names`."""
        ...


class Inheritance(Protocol):
    """Decides what a new state takes over from a saved one."""

    def source(self, name: str, shape: tuple[int, ...]) -> Source:
        """Return the source of an array of the state; `name` is its path in the state."""
        ...

    def report(self) -> dict[str, dict[str, str]]:
        """Return path of a parameter -> part of its state -> "" if it is taken over, else the reason."""
        ...

    def notes(self) -> list[str]:
        """Return further lines for the user."""
        ...


class Service:
    """Work of an optimizer on the host around the steps, on optimizer states. This one does nothing."""

    def start(self, state: Any) -> Any:
        """Begin before the first step, with what `with_in_flight` added to the state."""
        return state

    def install(self, state: Any) -> Any:
        """Return the state before a step.

        Raises:
          ServiceError: the service failed; the state is unchanged.
        """
        return state

    def take(self, state: Any) -> None:
        """Read the state after a step, before it is donated."""

    def with_in_flight(self, state: Any) -> Any:
        """Return the state for a checkpoint."""
        return state

    def metrics(self) -> dict[str, float]:
        """Return numbers to report, by name."""
        return {}

    def complaint(self) -> str | None:
        """Return a warning about the time since the last call, if any."""
        return None

    def close(self) -> None:
        """End without waiting for unfinished work."""


def _call(tx: optax.GradientTransformation, method: str, *arguments: Any) -> Any:
    """Call an optional method of an optimizer; return None if it has none."""
    own = getattr(tx, method, None)
    return own(*arguments) if own else None


def service(tx: optax.GradientTransformation, params: Any) -> Service:
    """Return the optimizer's service."""
    return _call(tx, "host_roots", params) or Service()


def state_shardings(tx: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
    """Return a tree of NamedSharding shaped like `tx.init(params)`.

    By default an array that mirrors a parameter (its path ends with the parameter's, its shape is the same: momenta,
    second moments) has the parameter's sharding, and everything else is replicated.

    Args:
      tx: the optimizer.
      params: ShapeDtypeStructs with shardings.
      mesh: the mesh.
    """
    own = _call(tx, "state_shardings", params)
    if own is not None:
        return own
    mirrored = dict(zip(patterns.paths(params), jax.tree.leaves(params), strict=True))

    def sharding(key_path, leaf):
        for start in range(len(key_path)):
            parameter = mirrored.get(patterns.path_name(key_path[start:]))
            if parameter is not None and parameter.shape == leaf.shape:
                return parameter.sharding
        return meshes.replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(tx.init, params))


def diagnostics(tx: optax.GradientTransformation, state: Any) -> dict[str, jax.Array]:
    """Return scalars about the optimizer (refreshes, failures, residuals), by name."""
    return _call(tx, "diagnostics", state) or {}


def treatments(tx: optax.GradientTransformation, params: Any) -> dict[str, str]:
    """Return parameter path -> short text on its treatment; empty if all parameters are treated alike."""
    return _call(tx, "treatments", params) or {}


def saved_spec(tx: optax.GradientTransformation, abstract: Any, params: Any) -> Any:
    """Return the optimizer's state in checkpoints: ShapeDtypeStructs with shardings."""
    own = _call(tx, "saved_spec", params)
    return abstract if own is None else own


def manifest(tx: optax.GradientTransformation, params: Any) -> dict[str, Any]:
    """Return the description of the optimizer's state that a checkpoint keeps beside its arrays, as JSON."""
    return _call(tx, "manifest", params) or {}


def inheritance(
    tx: optax.GradientTransformation,
    params: Any,
    manifest: Any,
    shapes: Mapping[str, tuple[int, ...]],
    renamed: Callable[[str], str],
) -> Inheritance:
    """Return what the optimizer's state takes over from one saved by an optimizer of the same name.

    Args:
      tx: the optimizer.
      params: its parameters, ShapeDtypeStructs with shardings.
      manifest: of the saved state.
      shapes: name -> shape of the saved arrays.
      renamed: maps a saved parameter's path to its present name.

    Raises:
      ValueError: the manifest is invalid.
    """
    own = _call(tx, "inheritance", params, manifest, shapes, renamed)
    return own or _ByName(params, jax.eval_shape(tx.init, params), shapes, renamed)


class _ByName:
    """Inheritance of a state by the names of its arrays, which end with those of the parameters they belong to."""

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
            return Fresh("not saved")
        if self._shapes[saved] != shape:
            return Fresh(f"of shape {list(self._shapes[saved])} there, {list(shape)} here")
        return Kept(saved)

    def report(self) -> dict[str, dict[str, str]]:
        return self._report

    def notes(self) -> list[str]:
        return self._notes


def _renamed_end(name: str, renamed: Callable[[str], str]) -> str:
    """Return a name whose longest renamed end is renamed."""
    parts = name.split("/")
    for start in range(len(parts)):
        end = "/".join(parts[start:])
        if renamed(end) != end:
            return "/".join([*parts[:start], renamed(end)])
    return name
