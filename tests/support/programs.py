"""Compile optimizer steps, and read their collectives, loops, FLOPs and memory."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from shampax.framework import optimizer
from shampax.framework.planning import hlo
from shampax.framework.planning.collectives import Collective
from shampax.optimizers import ShampooOptions, distributed_shampoo

# Attributes of instructions that name computations.
_CALLS = ("body", "condition", "calls", "to_apply", "true_computation", "false_computation", "branch_computations")
_CALLS += ("called_computations",)
Specs = Callable[[str], PartitionSpec]
Shapes = Mapping[str, tuple[int, ...]]


def transformer(layers: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the matrices of a Transformer without scanned layers."""
    square, hidden = (width, width), 4 * width
    shapes = dict.fromkeys("qkvo", square) | {"up": (width, hidden), "down": (hidden, width)}
    return {f"{layer}/{name}": shape for layer in range(layers) for name, shape in shapes.items()}


def scanned_transformer(layers: int, width: int) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[str, ...]]]:
    """Return (shapes, axis names) of the same with scanned layers."""
    shapes = {name[2:]: (layers, *shape) for name, shape in transformer(1, width).items()}
    return shapes, dict.fromkeys(shapes, ("layers", "inputs", "outputs"))


def mesh_of(**axes: int) -> Mesh:
    """Return a mesh of the first simulated devices."""
    devices = np.array(jax.devices()[: math.prod(axes.values())])
    return Mesh(devices.reshape(tuple(axes.values())), tuple(axes))


def replicated(name: str) -> PartitionSpec:
    """Replicate every parameter."""
    return PartitionSpec()


def fsdp(name: str) -> PartitionSpec:
    """Shard the axis of the residual stream over `fsdp`."""
    return PartitionSpec(None, "fsdp") if name.endswith(("o", "down")) else PartitionSpec("fsdp")


def fsdp_tensor(name: str) -> PartitionSpec:
    """Shard also heads and hidden units over `tensor`."""
    return PartitionSpec("tensor", "fsdp") if name.endswith(("o", "down")) else PartitionSpec("fsdp", "tensor")


def structs(shapes: Shapes, mesh: Mesh | None, specs: Specs) -> dict[str, jax.ShapeDtypeStruct]:
    """Return parameters without values, with shardings on a mesh."""
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, specs(name)) if mesh else None)
        for name, shape in shapes.items()
    }


def laid_out_state(tx: optax.GradientTransformation, params: Any, mesh: Mesh | None) -> Any:
    """Return an optimizer's state without values, with the trainer's shardings."""
    state = jax.eval_shape(tx.init, params)
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), state)
    else:
        shardings = optimizer.state_shardings(tx, params, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


class Step(NamedTuple):
    """One step of an optimizer, lowered: (gradients, state, parameters) -> (updates, state).

    Attributes:
      tx: the optimizer.
      params, state: ShapeDtypeStructs with shardings.
      lowered: the step; the state is donated, updates are sharded like the parameters.
    """

    tx: Any
    params: Any
    state: Any
    lowered: jax.stages.Lowered


def lower_step(tx: optax.GradientTransformation, params: Any, mesh: Mesh | None) -> Step:
    """Lower a step; see Step."""
    state = laid_out_state(tx, params, mesh)
    own = jax.tree.map(lambda x: x.sharding, (params, state)) if mesh else None
    lowered = jax.jit(tx.update, out_shardings=own, donate_argnums=1).lower(params, state, params)
    return Step(tx, params, state, lowered)


def lower_shampoo(shapes: Shapes, mesh: Mesh | None, specs: Specs, options: ShampooOptions, names: Any = None) -> Step:
    """Lower a step of Distributed Shampoo that gets the shardings of the parameters."""
    by_name = {name: specs(name) for name in shapes} if mesh else None
    tx = distributed_shampoo(0.01, options, mesh=mesh, axis_names=names, param_specs=by_name)
    return lower_step(tx, structs(shapes, mesh, specs), mesh)


def device_bytes(tree: Any) -> int:
    """Return the bytes per device of ShapeDtypeStructs with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def total(found: Sequence[Collective], *kinds: str) -> int:
    """Return the bytes of the results of some kinds of collectives."""
    return sum(c.bytes for c in found if c.kind in kinds)


def inside_loops(text: str) -> list[hlo.Instruction]:
    """Return the instructions of all loops of a compiled program, including called computations."""
    module = hlo.parse(text)
    every = [each for computation in module.computations.values() for each in computation.values()]
    waiting = [name for each in every if each.opcode == "while" for name in each.called(*_CALLS)]
    seen: dict[str, list[hlo.Instruction]] = {}
    while waiting:
        if (name := waiting.pop()) not in seen:
            seen[name] = list(module.computations[name].values())
            waiting += [called for each in seen[name] for called in each.called(*_CALLS)]
    return [each for instructions in seen.values() for each in instructions]


def communicates(instructions: Sequence[hlo.Instruction]) -> bool:
    """Return whether a collective is among the instructions."""
    return any(re.match("all-|reduce-scatter|collective-|ragged-all", each.opcode) for each in instructions)
