"""Sharding rules: one table from logical axes of arrays to mesh axes decides how every array is sharded."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...optimizers.plan import patterns
from ..base.errors import UserError
from . import meshes

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]
_LARGEST_REPLICATED = 2**24  # bytes of an array that may be replicated although a rule shards it


@dataclasses.dataclass(frozen=True)
class Placement:
    """The sharding of one array.

    Attributes:
      spec: mesh axes per dimension.
      notes: reasons, one for each rule that could not be followed; its dimension is replicated.
      unused: those of the notes whose mesh axis therefore shards no dimension.
    """

    spec: PartitionSpec
    notes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def mesh_of(config: Any, devices: Sequence[Any] | None) -> Mesh:
    """Return the mesh of a config, checked against its batch and its sharding rules.

    Args:
      config: a complete config.
      devices: devices to use; None for all devices of the job.

    Raises:
      UserError: mesh, batch and rules do not fit each other or the devices.
    """
    mesh = meshes.make_mesh(config.mesh, devices, config.slices)
    rules = config.sharding_rules
    for name, _ in rules:
        for axis in _axes(name, rules):
            if axis not in mesh.shape or axis == meshes.SLICE_AXIS:
                raise UserError(
                    f'config.sharding_rules: the rule for "{name}" names the mesh axis "{axis}". Use None or one of '
                    f"{', '.join(config.mesh)}."
                )
    meshes.check_batch(config.batch_size, config.microbatches, mesh)
    return mesh


def place(shape: tuple[int, ...], names: tuple[str | None, ...], rules: Rules, mesh: Mesh) -> Placement:
    """Apply the rules to one array.

    The first rule with a dimension's name decides. A mesh axis can shard one dimension of an array: the first that asks
    for it. A dimension that the axis does not divide evenly is replicated.

    Raises:
      ValueError: `names` does not fit `shape`, or a name has no rule.
    """
    if len(names) != len(shape):
        raise ValueError(f"logical axes {names} name {len(names)} dimensions, but the shape {shape} has {len(shape)}")
    spec: list[str | tuple[str, ...] | None] = []
    notes: list[str] = []
    indivisible: dict[str, str] = {}
    used: set[str] = set()
    for size, name in zip(shape, names, strict=True):
        taken: tuple[str, ...] = ()
        for axis in _axes(name, rules):
            parts = math.prod(mesh.shape[other] for other in taken) * mesh.shape[axis]
            if mesh.shape[axis] == 1:
                continue
            if axis in used:
                notes.append(f"{name}: {axis} already used")
            elif size % parts:
                indivisible[axis] = f"{name}: {size} not divisible by {parts} ({axis})"
                notes.append(indivisible[axis])
            else:
                taken += (axis,)
                used.add(axis)
        spec.append(taken[0] if len(taken) == 1 else taken or None)
    while spec and spec[-1] is None:
        spec.pop()
    unused = tuple(note for axis, note in indivisible.items() if axis not in used)
    return Placement(PartitionSpec(*spec), tuple(notes), unused)


def _axes(name: str | None, rules: Rules) -> tuple[str, ...]:
    if name is None:
        return ()
    for logical, axes in rules:
        if logical == name:
            return (axes,) if isinstance(axes, str) else tuple(axes or ())
    known = ", ".join(logical for logical, _ in rules)
    raise ValueError(f'logical axis "{name}" has no rule in config.sharding_rules ({known}). Add ("{name}", None).')


def place_all(variables: Any, axes: Any, rules: Rules, mesh: Mesh) -> dict[str, Placement]:
    """Return the sharding of every array in a tree, by "/"-joined path.

    Args:
      variables: arrays or ShapeDtypeStructs.
      axes: the same tree with a tuple of logical names for each array.
      rules: (logical name, mesh axis | axes | None); the first rule with a name decides.
      mesh: the mesh.

    Raises:
      UserError: the names do not fit an array, a name has no rule, or a large array would be replicated although a rule
        shards it.
    """
    leaves = jax.tree.leaves(variables)
    try:
        names = jax.tree.structure(variables).flatten_up_to(axes)
    except ValueError as error:
        raise UserError(f"the task's logical_axes differ in structure from its variables: {error}") from None
    placements = {}
    for path, leaf, leaf_names in zip(patterns.paths(variables), leaves, names, strict=True):
        try:
            placements[path] = placed = place(leaf.shape, tuple(leaf_names), rules, mesh)
        except ValueError as error:
            raise UserError(f"parameter {path}: {error}") from None
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if placed.unused and size > _LARGEST_REPLICATED:
            reason = placed.unused[0]
            raise UserError(
                f"parameter {path}: {reason}, so that {size / 1e6:,.0f} MB would be replicated along this axis. Change "
                f"the size or config.mesh, or put ({reason.partition(':')[0]!r}, None) first in config.sharding_rules."
            )
    return placements


def shardings(variables: Any, placements: Mapping[str, Placement], mesh: Mesh) -> Any:
    """Return a tree of NamedShardings shaped like `variables`, from the result of `place_all`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, placements[patterns.path_name(path)].spec), variables
    )


def describe(spec: PartitionSpec) -> str:
    """Return "replicated", or the mesh axes per dimension such as "fsdp,-,tensor"."""
    if not any(spec):
        return "replicated"
    return ",".join("+".join(axes) if isinstance(axes, tuple) else axes or "-" for axes in spec)
