"""The mesh, and where every array lies on it: one table of (logical name, mesh axis) rules decides."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ...optimizers.plan import patterns
from ..base.errors import UserError

# Mesh axes over which the examples of a batch are spread. The last varies fastest, so that tokens on their way to the
# experts move between neighbours.
BATCH_AXES = ("data", "fsdp", "expert")

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, axes in the order of `sizes`, neighbours on it neighbours on the physical
    network.

    Axis types are Auto: the compiler places what the rules leave open.

    Args:
      sizes: devices along each axis; one of them may be -1, the rest of the devices.
      devices: what to use instead of every device of the job.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or the slice cannot be cut so.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = _fill(sizes, len(devices))
    try:
        # An axis of the network is divided only where no whole ones will do.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError) as error:  # the network of a TPU slice cannot be cut so
        kind = devices[0].device_kind
        raise UserError(f"mesh {dict(sizes)} does not fit the network of {len(devices)} {kind} ({error})") from error
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


def _fill(sizes: Mapping[str, int], available: int) -> tuple[int, ...]:
    shape = tuple(sizes.values())
    text = "x".join(map(str, shape))
    names = "x".join(sizes)
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"mesh {text} ({names}) needs sizes of at least 1, at most one of them -1 (the rest)")
    fixed = math.prod(size for size in shape if size != -1)
    if fixed > available:
        raise UserError(
            f"mesh {text} ({names}) needs {fixed} devices but {available} are here; use a smaller axis or "
            "more devices (on a CPU: config.simulated_devices)"
        )
    if -1 in shape:
        if available % fixed:
            raise UserError(
                f"mesh {text} ({names}): {available} devices are not divisible by {fixed}; "
                f"use {_divisors(available)} for the fixed axes together"
            )
        return tuple(available // fixed if size == -1 else size for size in shape)
    if fixed < available:
        raise UserError(f"mesh {text} ({names}) uses {fixed} of {available} devices; set one axis to -1 (the rest)")
    return shape


def _divisors(number: int) -> str:
    divisors = [str(divisor) for divisor in range(1, number + 1) if number % divisor == 0]
    return ", ".join(divisors[:-1]) + " or " + divisors[-1] if divisors[:-1] else divisors[-1]


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that divide a batch between them."""
    return tuple(axis for axis in BATCH_AXES if axis in mesh.shape)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples (the leading dimension) over the batch axes, everything else whole.

    The sequence axis divides activations only: rows have one token more than there are positions, and are small.
    """
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, microbatches: int, mesh: Mesh) -> None:
    """Every device must get equally many examples of every micro-batch.

    Raises:
      UserError: it would not; the message names the nearest batch sizes that work.
    """
    if batch_size < 1 or microbatches < 1:
        raise UserError(f"batch {batch_size} in {microbatches} microbatches: both must be at least 1")
    shards = math.prod(mesh.shape[axis] for axis in batch_axes(mesh))
    parts = shards * microbatches
    if batch_size % parts:
        below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
        fix = f"use {below} or {above}" if below else f"use {above}"
        by = f"{shards} data shards" + (f" x {microbatches} microbatches = {parts}" if microbatches > 1 else "")
        raise UserError(f"batch {batch_size} is not divisible by {by}; {fix}")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one array lies.

    Attributes:
      spec: mesh axes per dimension.
      notes: for each rule that could not be followed, why; such a dimension stays whole.
    """

    spec: PartitionSpec
    notes: tuple[str, ...] = ()


def place(shape: tuple[int, ...], names: tuple[str | None, ...], rules: Rules, mesh: Mesh) -> Placement:
    """Apply the rules to one array.

    The first rule with a dimension's name decides. A mesh axis divides one dimension of an array at most: the
    first dimension to ask for it gets it. Where an axis does not divide a dimension evenly, the dimension
    stays whole.

    Raises:
      ValueError: `names` does not fit `shape`, or a name has no rule.
    """
    if len(names) != len(shape):
        raise ValueError(f"logical axes {names} name {len(names)} dimensions, but the shape {shape} has {len(shape)}")
    spec: list[str | tuple[str, ...] | None] = []
    notes = []
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
                notes.append(f"{name}: {size} not divisible by {parts} ({axis})")
            else:
                taken += (axis,)
                used.add(axis)
        spec.append(taken[0] if len(taken) == 1 else taken or None)
    while spec and spec[-1] is None:
        spec.pop()
    return Placement(PartitionSpec(*spec), tuple(notes))


def _axes(name: str | None, rules: Rules) -> tuple[str, ...]:
    if name is None:
        return ()
    for logical, axes in rules:
        if logical == name:
            return (axes,) if isinstance(axes, str) else tuple(axes or ())
    known = ", ".join(logical for logical, _ in rules)
    raise ValueError(f'logical axis "{name}" has no rule (there are rules for {known}); add ("{name}", None)')


def check_rules(rules: Rules, mesh: Mesh) -> None:
    """Every rule must name axes of this mesh.

    Raises:
      UserError: it does not.
    """
    for name, _ in rules:
        for axis in _axes(name, rules):
            if axis not in mesh.shape:
                raise UserError(
                    f'sharding rule "{name}" names the mesh axis "{axis}", but the mesh has '
                    f"{', '.join(mesh.axis_names)}; use one of these or None"
                )


def place_all(variables: Any, axes: Any, rules: Rules, mesh: Mesh) -> dict[str, Placement]:
    """The placement of every array in a tree, by "/"-joined path.

    Args:
      variables: arrays or ShapeDtypeStructs.
      axes: the same tree with a tuple of logical names for each array.
      rules: (logical name, mesh axis | axes | None); the first rule with a name decides.
      mesh: the mesh.

    Raises:
      UserError: the names do not fit an array, or a name has no rule.
    """
    leaves = jax.tree.leaves(variables)
    try:
        names = jax.tree.structure(variables).flatten_up_to(axes)
    except ValueError as error:
        raise UserError(f"the task's logical_axes differ in structure from its variables: {error}") from None
    placements = {}
    for path, leaf, leaf_names in zip(patterns.paths(variables), leaves, names, strict=True):
        try:
            placements[path] = place(leaf.shape, tuple(leaf_names), rules, mesh)
        except ValueError as error:
            raise UserError(f"parameter {path}: {error}") from None
    return placements


def shardings(variables: Any, placements: Mapping[str, Placement], mesh: Mesh) -> Any:
    """A tree of NamedSharding shaped like `variables`, from the placements of `place_all`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, placements[patterns.path_name(path)].spec), variables
    )


def describe(spec: PartitionSpec) -> str:
    """`replicated`, or the mesh axes per dimension: `fsdp,-,tensor`."""
    if not any(spec):
        return "replicated"
    return ",".join("+".join(axes) if isinstance(axes, tuple) else axes or "-" for axes in spec)


def bytes_on_device(tree: Any) -> int:
    """Return the bytes that one device holds of a tree of ShapeDtypeStructs or arrays with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
