"""Run Distributed Shampoo on given gradients. Runs with equal options and layout share one compiled step."""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shampax.framework.optimizer import service
from shampax.optimizers import DistributedShampoo, ShampooOptions, ShampooState, distributed_shampoo
from shampax.optimizers.checkpoint.inheritance import Kept, Made
from shampax.optimizers.plan import patterns
from shampax.optimizers.preconditioners import PRECONDITIONERS

Tree = dict[str, Any]

# A run that must be equal on every mesh: two buckets, a padded parameter and a diagonal one.
SHARDED_SHAPES = {"bias": (64,), "down": (64, 24), "odd": (31, 23), "square": (32, 16), "up": (24, 64)}
# Shampoo alone.
PLAIN = {"orthogonalize": 0, "nesterov": False, "beta2": 0.99}
# As many phases on every mesh.
SHARDED_OPTIONS = ShampooOptions(block_size=16, interval=4, phases=4, early_intervals=(), exponent=0.5, ridge=1e-4)
# The treatments of the other preconditioners.
SIBLINGS = [name for name, member in PRECONDITIONERS.items() if member.name == name != "shampoo"]


def sharded_options(kind: str) -> ShampooOptions:
    """Return `SHARDED_OPTIONS` with another preconditioner on every matrix.

    Statistics have full rank before the first refresh, because other eigenvectors are arbitrary.
    """
    if kind == "shampoo":
        return SHARDED_OPTIONS
    start_step = 7 if kind in SIBLINGS else 0
    return dataclasses.replace(SHARDED_OPTIONS, treatments=((".*", kind),), start_step=start_step)


# All of these kinds in one program: a matrix of eight blocks and a padded one for each.
FAMILY_PARAMETERS = {kind: (f"{kind} down", f"{kind} odd") for kind in SIBLINGS}
FAMILY_SHAPES = {path: SHARDED_SHAPES[path.split()[-1]] for paths in FAMILY_PARAMETERS.values() for path in paths}
FAMILY_OPTIONS = dataclasses.replace(
    SHARDED_OPTIONS, treatments=tuple((f"{re.escape(kind)} .*", kind) for kind in SIBLINGS), start_step=7
)


def _layouts() -> dict[str, tuple[Mesh | None, Tree | None]]:
    devices, spec = np.array(jax.devices()), PartitionSpec
    fsdp = {"bias": spec("fsdp"), "down": spec("fsdp"), "square": spec("fsdp"), "up": spec(None, "fsdp")}
    both = {
        "bias": spec("tensor"),
        "down": spec("tensor", "fsdp"),
        "square": spec("fsdp"),
        "up": spec("fsdp", "tensor"),
    }
    return {
        "one device": (None, None),
        "three devices": (Mesh(devices[:3], ("data",)), None),
        "replicated": (Mesh(devices.reshape(2, 4), ("data", "fsdp")), None),
        "fsdp": (Mesh(devices, ("fsdp",)), fsdp | {"odd": spec()}),
        "fsdp x tensor": (Mesh(devices.reshape(4, 2), ("fsdp", "tensor")), both | {"odd": spec()}),
    }


# Name -> (mesh, specs of the parameters).
LAYOUTS = _layouts()


def family_layout(name: str) -> tuple[Mesh | None, Tree | None]:
    """Return the mesh of a layout and the specs of `FAMILY_SHAPES` on it."""
    mesh, specs = LAYOUTS[name]
    return mesh, specs and {path: specs[path.split()[-1]] for path in FAMILY_SHAPES}


class Run(NamedTuple):
    """The updates (NumPy, for a learning rate of 1) and the state after each step."""

    updates: list[dict[str, np.ndarray]]
    states: list[ShampooState]

    def positions(self, start: Mapping[str, np.ndarray] | None = None) -> list[dict[str, np.ndarray]]:
        """Return the parameters after each step, from `start` or from zeros."""
        now = start or {k: np.zeros_like(u) for k, u in self.updates[0].items()}
        return [now := {k: now[k] + u for k, u in updates.items()} for updates in self.updates]


def gradients(steps: int, shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> list[Tree]:
    """Return N(0, 1) gradients."""
    random = np.random.default_rng(seed)
    return [{k: random.normal(size=s).astype(np.float32) for k, s in shapes.items()} for _ in range(steps)]


def zeros(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return parameters to start from."""
    return {k: np.zeros(s, np.float32) for k, s in shapes.items()}


def optimizer(
    options: ShampooOptions,
    mesh: Mesh | None = None,
    names: Tree | None = None,
    specs: Tree | None = None,
) -> DistributedShampoo:
    """Return Distributed Shampoo with a learning rate of 1. Without specs, parameters are replicated."""
    return distributed_shampoo(1.0, options, mesh=mesh, axis_names=names, param_specs=specs)


def place(tree: Tree, mesh: Mesh | None, specs: Tree | None) -> Tree:
    """Put arrays on devices by their specs."""
    if mesh is None:
        return jax.device_put(tree, jax.devices()[0])
    return {k: jax.device_put(x, NamedSharding(mesh, (specs or {}).get(k, PartitionSpec()))) for k, x in tree.items()}


def _frozen(tree: Tree | None) -> Any:
    return tree and tuple(sorted(tree.items()))


@functools.cache
def _compiled(options: ShampooOptions, mesh: Mesh | None, names: Any, specs: Any, like: Any) -> tuple[Any, ...]:
    """Return (optimizer, shardings of its state, init, step) for parameters given as (name, shape, dtype).

    The step returns (updates, state, parameters).
    """
    specs = specs and dict(specs)
    tx = optimizer(options, mesh, names and dict(names), specs)
    params = place({k: np.zeros(shape, dtype) for k, shape, dtype in like}, mesh, specs)
    shardings = tx.state_shardings(params)
    own = jax.tree.map(lambda x: x.sharding, params)

    def step(grads: Tree, state: ShampooState, params: Tree) -> tuple[Tree, ShampooState, Tree]:
        updates, state = tx.update(grads, state, params)
        return updates, state, optax.apply_updates(params, updates)

    out = (own, shardings, own) if mesh is not None else None
    return tx, shardings, jax.jit(tx.init, out_shardings=shardings), jax.jit(step, out_shardings=out)


def train(
    options: ShampooOptions,
    stream: Sequence[Tree],
    *,
    params: Tree | None = None,
    state: ShampooState | None = None,
    mesh: Mesh | None = None,
    names: Tree | None = None,
    specs: Tree | None = None,
) -> Run:
    """Train one step on each gradient of the stream, from a state or from the start."""
    like = tuple((k, g.shape, g.dtype) for k, g in sorted(stream[0].items()))
    tx, shardings, init, step = _compiled(options, mesh, _frozen(names), _frozen(specs), like)
    params = place(params or {k: np.zeros_like(g) for k, g in stream[0].items()}, mesh, specs)
    # A state with other shardings would compile the step again.
    state = init(params) if state is None else jax.device_put(state, shardings or jax.devices()[0])
    run = Run([], [])
    with contextlib.closing(service(tx, params)) as host:
        state = host.start(state)
        for grads in stream:
            updates, state, params = step(place(grads, mesh, specs), host.install(state), params)
            host.take(state)
            run.updates.append(jax.tree.map(np.asarray, updates))
            run.states.append(state)
    return run


def by_block(tx: DistributedShampoo, params: Tree, state: ShampooState) -> dict[tuple[str, int], Any]:
    """Return (path, number of the block in its parameter) -> state of the block."""
    result = {}
    for bucket in tx.layout(params).plan.buckets:
        kept, number = state.buckets[bucket.name], 0
        arrays = jax.tree.map(np.asarray, kept._replace(block=None))
        for leaf in bucket.leaves:
            for i in range(leaf.tiling.blocks):
                (slot,) = np.flatnonzero(np.asarray(kept.block) == number)
                result[leaf.path, i] = jax.tree.map(lambda x, slot=slot: x[slot], arrays)
                number += 1
    return result


def inherited(tx, params, manifest, saved, renamed=lambda path: path):
    """Return the state of `tx` for `params` as NumPy checkpoint arrays, restored from a saved state."""
    arrays = {name: np.asarray(x) for name, x in zip(patterns.paths(saved), jax.tree.leaves(saved), strict=True)}
    shapes = {name: x.shape for name, x in arrays.items()}
    inheritance = tx.layout(params).inheritance(json.loads(json.dumps(manifest)), shapes, renamed)
    spec = tx.layout(params).saved_spec(params)

    def array(name, like):
        source = inheritance.source(name, like.shape)
        if isinstance(source, Kept):
            return arrays[source.name]
        if isinstance(source, Made):
            return np.asarray(source.make({name: arrays[name] for name in source.names}), like.dtype)
        return np.zeros(like.shape, like.dtype)

    values = [array(name, like) for name, like in zip(patterns.paths(spec), jax.tree.leaves(spec), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(spec), values)
