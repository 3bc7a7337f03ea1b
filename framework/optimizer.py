"""The trainer's contract with an optimizer.

An optimizer is an `optax.GradientTransformation`, built by its options; plain optax needs nothing else. A part of its
state whose arrays are not shaped like the parameters can carry a static attribute `layout`, which tells the trainer how
to shard, describe, save and restore that part, with the methods of `optimizers.state.Layout`. It is found wherever the
part is: in `optax.chain`, `MultiSteps`, `masked`, `multi_transform` and so on.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from ..optimizers.checkpoint.inheritance import Fresh, Kept, Source, placed
from ..optimizers.checkpoint.inheritance import Inheritance as PartInheritance
from ..optimizers.host.service import HostRoots
from ..optimizers.host.service import HostRootsError as ServiceError
from ..optimizers.plan import patterns
from ..optimizers.state import Layout
from .sharding import meshes

__all__ = ["OptimizerOptions", "Service", "ServiceError"]


class OptimizerOptions(Protocol):
    """Options of an optimizer: the frozen dataclass that the config's `optimizer` section names."""

    def build(
        self, learning_rate: optax.Schedule, *, mesh: Mesh | None, axis_names: Any, param_specs: Any
    ) -> optax.GradientTransformation:
        """Return the optimizer for parameters on `mesh` with `param_specs` and dimensions named by `axis_names`.

        `learning_rate` is a function of the number of accepted steps. A ValueError reaches the user as one line.

        Options may also have `continuing(manifest)`, which returns those of a run that continues from a checkpoint,
        given the manifest that the layout of its state made.
        """
        ...


def _has_layout(node: Any) -> bool:
    return hasattr(node, "layout") and not isinstance(node, jax.Array | jax.ShapeDtypeStruct)


def _parts(state: Any) -> dict[str, Any]:
    """Return path -> part of an optimizer's state with a layout."""
    found, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=_has_layout)
    return {patterns.path_name(key_path): node for key_path, node in found if _has_layout(node)}


def _map_parts(function: Callable[[str, Any], Any], state: Any) -> Any:
    """Return the state with `function(path, part)` in place of each part with a layout."""
    return jax.tree_util.tree_map_with_path(
        lambda key_path, x: function(patterns.path_name(key_path), x) if _has_layout(x) else x,
        state,
        is_leaf=_has_layout,
    )


def layouts(tx: optax.GradientTransformation, params: Any) -> dict[str, Layout]:
    """Return path -> layout of each part of the state that has one."""
    return {path: part.layout for path, part in _parts(jax.eval_shape(tx.init, params)).items()}


def service(tx: optax.GradientTransformation, params: Any) -> "Service":
    """Return the services of all parts of the optimizer's state as one."""
    found = {path: layout.host_roots() for path, layout in layouts(tx, params).items()}
    return Service({path: one for path, one in found.items() if one is not None})


def expect_service(tx: optax.GradientTransformation, params: Any) -> None:
    """Tell the optimizer that `service` will be called, although its update may be traced before."""
    for layout in layouts(tx, params).values():
        layout.expect_host_roots()


class Service:
    """Work of an optimizer on the host around the steps, for all parts of its state; nothing if no part has a service.

    Args:
      parts: path of a part -> its service; see `HostRoots` for the methods.
    """

    def __init__(self, parts: Mapping[str, HostRoots]):
        self._parts = parts

    def _map(self, method: str, state: Any) -> Any:
        if not self._parts:
            return state
        return _map_parts(lambda path, x: getattr(self._parts[path], method)(x) if path in self._parts else x, state)

    def start(self, state: Any) -> Any:
        """Begin before the first step, with what `with_in_flight` added to the state."""
        return self._map("start", state)

    def install(self, state: Any) -> Any:
        """Return the state before a step.

        Raises:
          ServiceError: the service failed; the state is unchanged.
        """
        return self._map("install", state)

    def take(self, state: Any) -> None:
        """Read the state after a step, before it is donated."""
        for path, part in _parts(state).items() if self._parts else ():
            if path in self._parts:
                self._parts[path].take(part)

    def with_in_flight(self, state: Any) -> Any:
        """Return the state for a checkpoint."""
        return self._map("with_in_flight", state)

    def metrics(self) -> dict[str, float]:
        """Return numbers to report, by name."""
        return _joined({path: part.metrics() for path, part in self._parts.items()})

    def complaint(self) -> str | None:
        """Return a warning about the time since the last call, if any."""
        return "; ".join(filter(None, (part.complaint() for part in self._parts.values()))) or None

    def close(self) -> None:
        """End without waiting for unfinished work."""
        for part in self._parts.values():
            part.close()


def _joined(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Join the values of all parts, with the part's path in front of each name if there are several."""
    prefix = len(found) > 1
    return {f"{path}/{name}" if prefix else name: x for path, part in found.items() for name, x in part.items()}


def state_shardings(tx: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
    """Return a tree of NamedSharding shaped like `tx.init(params)`.

    Outside of parts with a layout, an array that mirrors a parameter (its path ends with the parameter's, its shape is
    the same: momenta, second moments) has the parameter's sharding, and everything else is replicated.

    Args:
      tx: the optimizer.
      params: ShapeDtypeStructs with shardings.
      mesh: the mesh.
    """
    mirrored = dict(zip(patterns.paths(params), jax.tree.leaves(params), strict=True))

    def sharding(key_path, leaf):
        if _has_layout(leaf):
            return leaf.layout.shardings(params)
        for start in range(len(key_path)):
            parameter = mirrored.get(patterns.path_name(key_path[start:]))
            if parameter is not None and parameter.shape == leaf.shape:
                return parameter.sharding
        return meshes.replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(tx.init, params), is_leaf=_has_layout)


def diagnostics(state: Any) -> dict[str, jax.Array]:
    """Return scalars about an optimizer's state (refreshes, failures, residuals), by name."""
    return _joined({path: part.layout.diagnostics(part) for path, part in _parts(state).items()})


def by_block(state: Any) -> dict[str, dict[str, jax.Array]]:
    """Return path of a part of the state -> arrays about its blocks."""
    return {path: part.layout.diagnostics_by_block(part) for path, part in _parts(state).items()}


def by_layer(
    tx: optax.GradientTransformation, params: Any
) -> Callable[[Mapping[str, Any]], tuple[list[str], dict[str, np.ndarray]]]:
    """Return the function from `by_block` on the host to names of layers and metric -> [layers]."""
    known = layouts(tx, params)

    def gathered(found: Mapping[str, Any]) -> tuple[list[str], dict[str, np.ndarray]]:
        tables = [known[path].diagnostics_by_layer(part) for path, part in found.items()]
        names = [name for table in tables for name in table[0]]
        return names, {key: np.concatenate([table[1][key] for table in tables]) for key in tables[0][1]}

    return gathered


def treatments(tx: optax.GradientTransformation, params: Any) -> dict[str, str]:
    """Return parameter path -> short text on its treatment; empty if all parameters are treated alike."""
    return {path: text for layout in layouts(tx, params).values() for path, text in layout.plan.treatments.items()}


def refuse_dense(tx: optax.GradientTransformation, params: Any, path: str) -> None:
    """Raise ValueError unless the gradient of a row of a parameter changes nothing but this row and its own state."""
    abstract = jax.eval_shape(tx.init, params)
    shape = dict(zip(patterns.paths(params), jax.tree.leaves(params), strict=True))[path].shape
    others = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=_has_layout)[0]
    mirrors = [leaf for _, leaf in others if not _has_layout(leaf) and leaf.shape == shape]
    if mirrors or [part.layout.is_sparse(path) for part in _parts(abstract).values()].count(True) != 1:
        raise ValueError(
            f"config.optimizer: the task updates only some rows of {path!r} in a step, which needs row-wise AdaGrad "
            "without weight decay. Treat it as 'rows', with decay_rules that leave it out, or switch off the task's "
            "sparse updates."
        )


def row_states(state: Any) -> dict[str, jax.Array]:
    """Return path of a table -> numbers that the state keeps for its rows, one for each."""
    return {path: x for part in _parts(state).values() for path, x in part.layout.row_sums(part).items()}


def with_row_states(state: Any, numbers: Mapping[str, jax.Array]) -> Any:
    """Return the state for tables with other rows, for which it keeps `numbers`."""

    def part(_: str, part: Any) -> Any:
        own = part.layout.row_sums(part).keys() & numbers.keys()
        return part.layout.with_row_sums(part, {path: numbers[path] for path in own}) if own else part

    return _map_parts(part, state)


def saved_spec(abstract: Any, params: Any) -> Any:
    """Return the optimizer's state in checkpoints: ShapeDtypeStructs with shardings."""
    return _map_parts(lambda path, part: part.layout.saved_spec(params), abstract)


def manifest(tx: optax.GradientTransformation, params: Any) -> dict[str, Any]:
    """Return path -> manifest of each part with a layout, as JSON."""
    return {path: layout.manifest() for path, layout in layouts(tx, params).items()}


class Inheritance:
    """The parts that an optimizer's state takes over from one saved by an optimizer of the same name.

    Parts with layouts are paired in order, so that a chain around an optimizer can change. Other arrays are found by
    name: it ends with the path of a parameter, which may have been renamed.

    Args:
      tx: the optimizer.
      params: its parameters, ShapeDtypeStructs with shardings.
      manifest: of the saved state.
      shapes: name -> shape of the saved arrays.
      renamed: maps a saved parameter's path to its present name.

    Raises:
      ValueError: the manifest is invalid.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        params: Any,
        manifest: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        renamed: Callable[[str], str],
    ):
        abstract = jax.eval_shape(tx.init, params)
        self._shapes = shapes
        self._saved = {_renamed_end(name, renamed): name for name in shapes}
        self._report: dict[str, dict[str, str]] = {path: {} for path in patterns.paths(params)}
        self._notes: list[str] = []
        # path of a part -> (path of the saved part, its inheritance)
        self._parts: dict[str, tuple[str, PartInheritance]] = {}
        parts = _parts(abstract)
        for (path, part), (saved, described) in zip(parts.items(), manifest.items(), strict=False):
            inside = {
                name.removeprefix(_under(saved)): x for name, x in shapes.items() if name.startswith(_under(saved))
            }
            self._parts[path] = saved, part.layout.inheritance(described, inside, renamed)
        for _, part in self._parts.values():
            self._notes += part.notes()
            for parameter, fates in part.report().items():
                self._report[parameter] |= fates
        self._unpaired = [path for path in parts if path not in self._parts]
        self._notes += [f"{path or 'state'} of the optimizer: initialised (not saved)" for path in self._unpaired]
        for name, leaf in zip(patterns.paths(abstract), jax.tree.leaves(abstract), strict=True):
            if not any(name.startswith(_under(path)) for path in parts):
                self._describe(name, self.source(name, leaf.shape))

    def source(self, name: str, shape: tuple[int, ...]) -> Source:
        """Return the source of an array of the state; `name` is its path in the state."""
        for path, (saved, part) in self._parts.items():
            if name.startswith(_under(path)):
                return placed(part.source(name.removeprefix(_under(path)), shape), _under(saved))
        there = self._saved.get(name)
        if there is None or any(name.startswith(_under(path)) for path in self._unpaired):
            return Fresh("not saved")
        if self._shapes[there] != shape:
            return Fresh(f"of shape {list(self._shapes[there])} there, {list(shape)} here")
        return Kept(there)

    def report(self) -> dict[str, dict[str, str]]:
        """Return path of a parameter -> part of its state -> "" if it is taken over, else the reason."""
        return self._report

    def notes(self) -> list[str]:
        """Return further lines for the user."""
        return self._notes

    def _describe(self, name: str, source: Source) -> None:
        why = source.why if isinstance(source, Fresh) else ""
        owners = [path for path in self._report if name.endswith(f"/{path}")]
        for path in owners:
            self._report[path][name[: -len(path) - 1]] = why
        if why and not owners:
            self._notes.append(f"{name} of the optimizer: initialised ({why})")


def _under(path: str) -> str:
    """Return what the names of arrays under a path begin with."""
    return f"{path}/" if path else ""


def _renamed_end(name: str, renamed: Callable[[str], str]) -> str:
    """Return a name whose longest renamed end is renamed."""
    parts = name.split("/")
    for start in range(len(parts)):
        end = "/".join(parts[start:])
        if renamed(end) != end:
            return "/".join([*parts[:start], renamed(end)])
    return name
