"""The mesh of devices, and how a batch is divided over it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ...optimizers.exchange import SLICE_AXIS
from ..base.errors import UserError

# Mesh axes over which the examples of a batch are spread. The last varies fastest, so that tokens routed to experts
# move between neighbours.
BATCH_AXES = (SLICE_AXIS, "data", "fsdp", "expert")
REPLICA_AXES = (SLICE_AXIS, "data")  # those that by default shard nothing else


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None, slices: int = 1) -> Mesh:
    """Return a mesh over all devices, axes in the order of `sizes`, laid out along the physical network.

    Axis types are Auto: the compiler shards what the rules leave open. Several slices are one more axis, the first, and
    all other axes lie within a slice.

    Args:
      sizes: devices of a slice along each axis; one of them may be -1, the rest of the devices.
      devices: devices to use; None for all devices of the job.
      slices: number of slices that a slower network connects; 0 for those of the TPU devices, or 1 for other devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or do not fit the network of a TPU slice.
    """
    groups = _slices(jax.devices() if devices is None else list(devices), slices)
    devices = groups[0]
    shape = _fill(sizes, len(devices))
    try:
        # A physical axis is split only if no whole ones fit.
        grids = [mesh_utils.create_device_mesh(shape, group, allow_split_physical_axes=True) for group in groups]
    except (NotImplementedError, ValueError) as error:
        kind = devices[0].device_kind
        raise UserError(
            f"config.mesh={dict(sizes)}: does not fit the network of {len(devices)} {kind} ({error}). Use other sizes."
        ) from error
    grid = np.stack(grids) if len(groups) > 1 else grids[0]
    axes = (SLICE_AXIS, *sizes) if len(groups) > 1 else tuple(sizes)
    return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))


def _slices(devices: Sequence[Any], count: int) -> list[list[Any]]:
    """Return the devices of each slice. TPUs know their slice; others are divided in the order of their processes."""

    def slice_of(device: Any) -> int:
        return getattr(device, "slice_index", None) or 0

    numbers = {slice_of(device) for device in devices}
    count = count or len(numbers)
    if len(numbers) > 1 and count != len(numbers):
        raise UserError(f"config.slices={count}: the devices are on {len(numbers)} slices. Use 0 or {len(numbers)}.")
    if len(devices) % count:
        raise UserError(f"config.slices={count}: does not divide {len(devices)} devices. Use a divisor, or 1.")
    each = len(devices) // count
    ordered = sorted(devices, key=lambda device: (slice_of(device), device.process_index))
    groups = [ordered[i : i + each] for i in range(0, len(devices), each)]
    if len(numbers) > 1 and any(slice_of(group[0]) != slice_of(group[-1]) for group in groups):
        raise UserError(f"config.slices={count}: the slices have different numbers of devices. Use equal ones.")
    return groups


def _fill(sizes: Mapping[str, int], available: int) -> tuple[int, ...]:
    shape = tuple(sizes.values())
    mesh = f"config.mesh={'x'.join(map(str, shape))} ({'x'.join(sizes)})"
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"{mesh}: every size must be at least 1, and at most one can be -1 (the rest).")
    fixed = math.prod(size for size in shape if size != -1)
    if fixed > available:
        raise UserError(
            f"{mesh}: needs {fixed} devices, but there are {available}. Use smaller sizes or more devices (on a CPU: "
            "config.simulated_devices)."
        )
    if -1 not in shape and fixed < available:
        raise UserError(f"{mesh}: uses {fixed} of {available} devices. Set one axis to -1 (the rest).")
    if available % fixed:
        fitting = ", ".join(str(divisor) for divisor in range(1, available + 1) if available % divisor == 0)
        raise UserError(
            f"{mesh}: {available} devices are not divisible by {fixed}. The other axes together can have {fitting}."
        )
    return tuple(available // fixed if size == -1 else size for size in shape)


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """Return the mesh axes that divide a batch."""
    return tuple(axis for axis in BATCH_AXES if axis in mesh.shape)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: the leading dimension over the batch axes.

    The sequence axis shards activations only: rows have one token more than there are positions, and are small.
    """
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, microbatches: int, mesh: Mesh) -> None:
    """Check that every device gets equally many examples of every micro-batch.

    Raises:
      UserError: it does not; the message has the nearest batch sizes that work.
    """
    shards = math.prod(mesh.shape[axis] for axis in batch_axes(mesh))
    parts = shards * microbatches
    if batch_size % parts:
        below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
        fix = f"{below} or {above}" if below else f"{above}"
        by = f"{shards} data shards" + (f" x {microbatches} microbatches = {parts}" if microbatches > 1 else "")
        raise UserError(f"config.batch_size={batch_size}: must be divisible by {by}. Use {fix}.")


def bytes_on_device(tree: Any) -> int:
    """Return the bytes that one device holds of a tree of ShapeDtypeStructs or arrays with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
