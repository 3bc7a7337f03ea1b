"""Distributed Shampoo as optax gradient transformations."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh

from .host.service import Event, HostRoots
from .options import Options
from .plan import patterns
from .precondition import precondition
from .promotion import standard_promotion
from .state import Layout, ShampooState


class DistributedShampoo(optax.GradientTransformation):
    """An optax gradient transformation that also tells the layout and the shardings of its state."""

    _layout: Callable[[Any], Layout]

    def layout(self, params: Any) -> Layout:
        """Return the static layout of the state for a tree of arrays or ShapeDtypeStructs."""
        return self._layout(params)

    def state_shardings(self, params: Any) -> ShampooState:
        """Return a tree of shardings shaped like the state, for arrays or ShapeDtypeStructs with shardings."""
        return self.layout(params).shardings(params)

    def host_roots(self, params: Any, events: list[Event] | None = None) -> HostRoots | None:
        """Return the service that computes roots on the host around the steps, or None unless refresh is "host".

        Args:
          params: arrays or ShapeDtypeStructs.
          events: list to which the service adds a record of its work, for figures.
        """
        return self.layout(params).host_roots(events)


@dataclasses.dataclass(frozen=True)
class ShampooOptions(Options):
    """Options of Distributed Shampoo with `build`, for configs; `Options` has the fields."""

    def build(
        self,
        learning_rate: float | optax.Schedule,
        *,
        mesh: Mesh | None = None,
        axis_names: Any = None,
        param_specs: Any = None,
    ) -> DistributedShampoo:
        """Return the optimizer; see `distributed_shampoo`."""
        return distributed_shampoo(learning_rate, self, mesh=mesh, axis_names=axis_names, param_specs=param_specs)

    def continuing(self, manifest: Mapping[str, Any]) -> "ShampooOptions":
        """Return the options for a run whose state has this manifest: it keeps its phases on another mesh."""
        phases = manifest.get("phases", 0)
        keeps = self.phases == 0 and self.refresh != "host" and 0 < phases <= self.interval
        return dataclasses.replace(self, phases=phases) if keeps else self


def scale_by_shampoo(
    options: Options | None = None, *, mesh: Mesh | None = None, axis_names: Any = None, param_specs: Any = None
) -> DistributedShampoo:
    """Replace gradients by Shampoo's directions, or diagonal ones where the treatment says so.

    It has no learning rate and no weight decay: `weight_decay`, `decay`, `decay_rules`, `rate_rules` and
    `diagonal_rate` of the options are ignored. Other parts of optax come before and after it:

        optax.chain(scale_by_shampoo(), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-3))

    If a number is not finite, the directions are zero and the state only counts the skipped step.

    Args:
      options: see ShampooOptions; None for the defaults.
      mesh: mesh whose devices own the blocks, independent of the parameters' shardings; None for one device.
      axis_names: tree with a tuple of axis names (or None) per parameter, or None. Names define stacks of matrices
        (scanned layers, experts) and folded sides (heads x head_dim).
      param_specs: tree with a PartitionSpec or NamedSharding per parameter, or None if they are replicated. It saves
        traffic: shards are sent directly to the owners of their blocks. The result does not depend on it.

    Raises:
      ValueError: the mesh has an axis that is not Auto. `init` raises it for a parameter that is not a real float, that
        no treatment matches, or whose names or spec do not fit its shape.
    """
    chosen = options or ShampooOptions()
    if mesh is not None and any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"mesh has axes of types {', '.join(map(str, mesh.axis_types))}: all must be Auto. Make it with "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_types)}."
        )
    known: dict[Layout, Layout] = {}

    def layout(params: Any) -> Layout:
        new = Layout.of(params, chosen, mesh, axis_names, param_specs)
        return known.setdefault(new, new)  # planning a large model takes seconds

    def update(updates: Any, state: ShampooState, params: Any = None) -> tuple[Any, ShampooState]:
        del params
        state.layout.check_host_roots()
        directions, state = _precondition(_leaves(updates, state.layout), state)
        return jax.tree.unflatten(jax.tree.structure(updates), directions), state

    return _transformation(layout, update)


def distributed_shampoo(
    learning_rate: float | optax.Schedule,
    options: Options | None = None,
    *,
    mesh: Mesh | None = None,
    axis_names: Any = None,
    param_specs: Any = None,
) -> DistributedShampoo:
    """Return Distributed Shampoo: `scale_by_shampoo` with weight decay and a learning rate.

    A skipped step changes no parameter, and does not advance the schedule.

    Args:
      learning_rate: a float, or a schedule over the number of accepted steps.
      options: see ShampooOptions; None for the defaults.
      mesh: see `scale_by_shampoo`.
      axis_names: see `scale_by_shampoo`.
      param_specs: see `scale_by_shampoo`.

    Returns:
      An optax gradient transformation with `state_shardings(params)`, `layout(params)` and `host_roots(params)`.

    Raises:
      ValueError: see `scale_by_shampoo`; `update` raises it if weight decay lacks the parameters.
    """
    chosen = options or ShampooOptions()
    inner = scale_by_shampoo(chosen, mesh=mesh, axis_names=axis_names, param_specs=param_specs)

    def update(updates: Any, state: ShampooState, params: Any = None) -> tuple[Any, ShampooState]:
        layout = state.layout
        layout.check_host_roots()
        if chosen.weight_decay and params is None:
            raise ValueError("params=None: weight decay needs the parameters. Call update(grads, state, params).")
        gradients = directions = _leaves(updates, layout)
        leaves = gradients if params is None else _leaves(params, layout)
        if chosen.decay == "coupled":
            directions = _decayed(directions, leaves, layout)
        directions, new = _precondition(directions, state)
        if chosen.decay == "decoupled":
            directions = _decayed(directions, leaves, layout)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        rate = jnp.where(new.count > state.count, -jnp.asarray(rate), 0)
        factors = [
            patterns.first_match(chosen.rate_rules, parameter.path)
            * (chosen.diagonal_rate if index in layout.plan.diagonal else layout.plan.scales[index])
            for index, parameter in enumerate(layout.parameters)
        ]
        changes = [
            (rate * factor * direction).astype(leaf.dtype)
            for factor, direction, leaf in zip(factors, directions, leaves, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(updates), changes), new

    return _transformation(inner.layout, update)


# One function for all transformations, so that outside of `jax.jit` a step is compiled once.
_precondition = jax.jit(precondition)


def _transformation(layout: Callable[[Any], Layout], update: Any) -> DistributedShampoo:
    def init(params: Any) -> Any:
        if type(params).__name__ == "_ParamsPlaceholder":
            raise ValueError(
                "optax.tree_map_params: this state has blocks of parameters. Use jax.tree.map on its arrays."
            )
        return layout(params).initial()

    result = DistributedShampoo(init, standard_promotion()(update))
    result._layout = layout
    return result


def _leaves(tree: Any, layout: Layout) -> list[jax.Array]:
    """Return the leaves of a tree of gradients or parameters, one for each parameter of the layout."""
    leaves, parameters = jax.tree.leaves(tree), layout.parameters
    if [jnp.shape(leaf) for leaf in leaves] != [parameter.shape for parameter in parameters]:
        found = dict(zip(patterns.paths(tree), leaves, strict=True))
        for path, shape, *_ in parameters:
            there = jnp.shape(found[path]) if path in found else "nothing"
            if there != shape:
                raise ValueError(f"parameter {path!r}: has {there} in update, shape {shape} in init. Pass equal trees.")
        raise ValueError(f"update has {len(leaves)} arrays, init had {len(parameters)}. Pass equal trees.")
    return [jnp.asarray(leaf) for leaf in leaves]


def _decayed(directions: list[jax.Array], params: list[jax.Array], layout: Layout) -> list[jax.Array]:
    """Add weight_decay x parameter, in float32, where the rules say so.

    The decoupled decay of a matrix in a step is proportional to 1 / width, whatever the factor of its rate.
    """
    options, scales = layout.options, layout.plan.scales
    if not options.weight_decay:
        return directions
    result = []
    for index, (x, param, parameter) in enumerate(zip(directions, params, layout.parameters, strict=True)):
        if patterns.first_match(options.decay_rules, parameter.path):
            shrinks = options.decay == "decoupled" and index in scales
            amount = options.weight_decay / (options.wider * scales[index] if shrinks else 1.0)
            x = x.astype(jnp.float32) + amount * param.astype(jnp.float32)
        result.append(x)
    return result
