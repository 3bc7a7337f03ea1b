"""Plan of the optimizer: cut parameters into blocks, and gather blocks of one shape into buckets.

The block shape of a parameter does not depend on other parameters or on the number of devices, so that a checkpoint can
identify a block by path and coordinates.
"""

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ..linalg.precision import Precision, precision_of
from ..options import Options, Treatment
from ..preconditioners import PRECONDITIONERS, Preconditioner
from . import patterns, width
from .assignment import assign_owners
from .tiles import Tiling, make_tiling
from .views import View, matrix_view, names_by_path, tensor_view

# Names of vectors, as in the default `decay_rules`.
_VECTORS = r"(.*/)?[^/]*(bias|scale|norm)[^/]*(/.*)?"
# Shape, sides, p, beta2, ridge, cut, orthogonalize and name of the preconditioner, which all blocks of a bucket share.
_Key = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One preconditioned parameter and its place in its bucket.

    Attributes:
      index: position among the leaves of the parameter tree.
      path: the parameter's path.
      tiling: its view, blocks and tiles.
    """

    index: int
    path: str
    tiling: Tiling

    @property
    def view(self) -> View:
        """Return the view of the parameter as a stack of tensors."""
        return self.tiling.view


@dataclasses.dataclass(frozen=True, eq=False)
class Bucket:
    """Blocks of one shape and treatment, in arrays [slots, *shape] whose slots are sharded over all devices.

    Block i of the bucket is block `first + i` of the plan. That number, the number of all blocks and that of phases
    determine the phase in which the block is due: with the same `phases`, runs on any number of devices are alike.

    Attributes:
      name: key of the bucket in states and checkpoints.
      shape: lengths of a block's sides with padding, shorter parameter sides first.
      sides: indices of the preconditioned sides.
      p: order of the inverse roots; 0 if no side has statistics.
      beta2: decay of the statistics and of the graft's second moment.
      ridge, cut: regularisers relative to the largest eigenvalue.
      orthogonalize: Newton-Schulz steps on the preconditioned direction.
      preconditioner: preconditioner of the blocks.
      precision: precision of their products.
      leaves: parameters whose blocks are in the bucket, in order.
      first: number of blocks in earlier buckets.
      owners: number of devices that share the slots.
      phases: number of steps of an interval over which the refreshes of all blocks are spread.
      phase: phase in which each block is due.
      owner: owner of each block.
    """

    name: str
    shape: tuple[int, ...]
    sides: tuple[int, ...]
    p: int
    beta2: float
    ridge: float
    cut: float
    orthogonalize: int
    preconditioner: Preconditioner
    precision: Precision
    leaves: tuple[Leaf, ...]
    first: int
    owners: int
    phases: int
    phase: tuple[int, ...]
    owner: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """Return the number of blocks."""
        return len(self.owner)

    @property
    def matrices(self) -> int:
        """Return the number of whole matrices, counting each of a stack, plus one for the empty slots."""
        return sum(leaf.view.stacked for leaf in self.leaves) + 1

    @functools.cached_property
    def slots(self) -> np.ndarray:
        """Return [owners, slots per owner] int32, the block in each slot, or `blocks` for an empty slot."""
        slots = np.full((self.owners, math.ceil(self.blocks / self.owners)), self.blocks, np.int32)
        owner = np.asarray(self.owner, np.int64)
        for device in range(self.owners):
            own = np.flatnonzero(owner == device)
            slots[device, : len(own)] = own
        return slots

    @functools.cached_property
    def slot_of_block(self) -> np.ndarray:
        """Return [blocks] int32, the position of each block in the flattened `slots`."""
        return np.argsort(self.slots.reshape(-1), kind="stable")[: self.blocks].astype(np.int32)

    @functools.cached_property
    def due(self) -> np.ndarray:
        """Return [owners, phases, window] int32, an owner's slots due in each phase, padded with slots per owner."""
        width = self.slots.shape[1]
        rows: list[list[list[int]]] = []
        for blocks in self.slots.tolist():
            rows.append([[] for _ in range(self.phases)])
            for slot, block in enumerate(blocks):
                if block < self.blocks:
                    rows[-1][self.phase[block]].append(slot)
        window = max(len(phase) for device in rows for phase in device)
        return np.array([[phase + [width] * (window - len(phase)) for phase in device] for device in rows], np.int32)

    @functools.cached_property
    def matrix_of_slot(self) -> np.ndarray:
        """Return [owners * slots] int32, the matrix of each slot's block; the last matrix for empty slots."""
        ids, first = [], 0
        for leaf in self.leaves:
            ids.append(first + np.repeat(np.arange(leaf.view.stacked), math.prod(leaf.tiling.pieces)))
            first += leaf.view.stacked
        return np.concatenate([*ids, [first]]).astype(np.int32)[self.slots.reshape(-1)]

    @functools.cached_property
    def real_sizes(self) -> np.ndarray:
        """Return [owners * slots, sides of a block] int32, the side lengths of each slot's block without padding."""
        sizes = []
        for leaf in self.leaves:
            sides = [
                np.clip(whole - part * np.arange(count), 0, part)
                for whole, part, count in zip(leaf.view.lengths, self.shape, leaf.tiling.pieces, strict=True)
            ]
            grid = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, len(sides))
            sizes.append(np.tile(grid, (leaf.view.stacked, 1)))
        return np.concatenate([*sizes, np.zeros((1, len(self.shape)))]).astype(np.int32)[self.slots.reshape(-1)]


@dataclasses.dataclass(frozen=True)
class DiagonalLeaf:
    """One parameter under diagonal or row-wise treatment.

    Attributes:
      path, shape: path and shape of the parameter.
      beta2: decay of its second moment.
      by_row: whether each row (along the last axis) has one second moment and no momentum.
    """

    path: str
    shape: tuple[int, ...]
    beta2: float
    by_row: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of all parameters.

    Attributes:
      buckets: buckets, ordered by key.
      diagonal: position among the leaves -> parameter under diagonal treatment.
      treatments: path -> a short text for tables.
      scales: position among the leaves -> factor of the learning rate that follows the width, for preconditioned ones.
    """

    buckets: tuple[Bucket, ...]
    diagonal: dict[int, DiagonalLeaf]
    treatments: dict[str, str]
    scales: dict[int, float]


def split(side: int, block_size: int) -> tuple[int, int]:
    """Split a side into equal parts; return (number of parts, length of each with padding).

    The length is rounded up to a multiple of 1/16 of its power of two (a multiple of 8 from 128). This limits the
    number of different shapes at the cost of at most 1/16 of padding.
    """
    pieces = math.ceil(side / block_size)
    length = math.ceil(side / pieces)
    granule = max(1, 2 ** (length.bit_length() - 1) // 16)
    # A part longer than the block size could leave the last block empty.
    return pieces, min(math.ceil(length / granule) * granule, block_size)


class Parameter(NamedTuple):
    """A parameter before it is planned.

    Attributes:
      path, shape: path and shape.
      names: name (or None) of each axis; None if names are not given.
      spec: its sharding; None if it is replicated.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str | None, ...] | None = None
    spec: PartitionSpec | None = None


def parameters(params: Any, axis_names: Any = None, param_specs: Any = None) -> tuple[Parameter, ...]:
    """Return the parameters of a tree of arrays or ShapeDtypeStructs.

    Args:
      params: the tree.
      axis_names: tree with a tuple of one name (or None) per axis, or None, for each parameter; or None.
      param_specs: tree with a PartitionSpec, a NamedSharding or None (replicated) for each parameter; or None.

    Raises:
      ValueError: a parameter is not real and floating, or has no entry in a tree that is given.
    """
    names = names_by_path(axis_names)
    specs = patterns.by_path(param_specs, lambda x: x is None or isinstance(x, PartitionSpec))
    result = []
    for path, leaf in zip(patterns.paths(params), jax.tree.leaves(params), strict=True):
        dtype = jax.dtypes.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"parameter {path!r}: has dtype {dtype}, must be a real float. Mask it: optax.masked.")
        for tree, given in (("axis_names", names), ("param_specs", specs)):
            if given and path not in given:
                raise ValueError(f"parameter {path!r}: must have an entry in {tree}. Add it.")
        spec = specs.get(path)
        spec = spec.spec if isinstance(spec, NamedSharding) else spec
        result.append(Parameter(path, tuple(np.shape(leaf)), names.get(path), spec))
    return tuple(result)


def make_plan(
    parameters: Sequence[Parameter], options: Options, mesh: Mapping[str, int], platform: str = "cpu"
) -> Plan:
    """Choose the treatment of every parameter, gather blocks into buckets and assign them to owners.

    Args:
      parameters: the parameters, in the order of the leaves of their tree.
      options: options of the optimizer.
      mesh: axis name -> number of devices; all devices own blocks.
      platform: JAX platform of the devices.

    Raises:
      ValueError: no treatment matches a path, or names or a spec do not fit a parameter.
    """
    rules = [(pattern, options.treatment(text)) for pattern, text in options.treatments]
    grouped: dict[_Key, list[Leaf]] = {}
    diagonal: dict[int, DiagonalLeaf] = {}
    treatments: dict[str, str] = {}
    scales: dict[int, float] = {}
    doubtful: list[str] = []
    for index, (path, shape, names, spec) in enumerate(parameters):
        _check(path, shape, names, spec, mesh)
        treatment = patterns.first_match(rules, path)
        view, sides = _view(shape, names, treatment, options)
        if treatment.kind == "rows" and len(shape) >= 2 and 0 not in shape:
            diagonal[index] = DiagonalLeaf(path, shape, beta2=1.0, by_row=True)
            treatments[path] = "rows (adagrad)"
            continue
        preconditioner = treatment.preconditioner
        if not preconditioner or not view.is_matrix:
            diagonal[index] = DiagonalLeaf(path, shape, options.diagonal_beta2_of(treatment))
            treatments[path] = f"diagonal ({options.diagonal})"
            continue
        if names is None and re.fullmatch(_VECTORS, path):
            doubtful.append(f"{path!r} {shape}")
        parts = [split(length, treatment.block_size) for length in view.lengths]
        pieces, block = (tuple(part[i] for part in parts) for i in (0, 1))
        p = treatment.order(len(sides))
        sides = sides if p else ()
        numbers = treatment.beta2, treatment.ridge, treatment.cut, treatment.orthogonalize
        key = (block, sides, p, *numbers, preconditioner.name)
        leaf = Leaf(index, path, make_tiling(view, pieces, block, spec, mesh))
        grouped.setdefault(key, []).append(leaf)
        label = preconditioner.label or (f"p{p}" if p else "momentum")
        scales[index] = width.factor(options, treatment, view.lengths, len(sides) / p if p else 0.0)
        scaled = f", rate x {scales[index]:.3g}" if options.wider != 1 else ""
        treatments[path] = f"{treatment.kind} {_title(block, sides, label)} x{leaf.tiling.blocks}{scaled}"
    if doubtful:
        others = f" (and {len(doubtful) - 1} others)" * (len(doubtful) > 1)
        warnings.warn(
            f"parameter {doubtful[0]}{others}: has the name of a vector and no axis names, and is preconditioned as a "
            f"matrix. If its first axis stacks layers, give axis_names, or put ({_VECTORS!r}, 'diagonal') first in "
            "treatments.",
            stacklevel=2,
        )
    return Plan(_buckets(grouped, math.prod(mesh.values()), platform, options), diagonal, treatments, scales)


def _view(
    shape: tuple[int, ...], names: tuple[str | None, ...] | None, treatment: Treatment, options: Options
) -> tuple[View, tuple[int, ...]]:
    """Return the parameter's view and its preconditioned sides."""
    stack, family = min(treatment.stack, len(shape)), treatment.preconditioner
    if treatment.view == "tensor" and treatment.side == "both" and not (family and family.matrices_only):
        view = tensor_view(shape, names, stack_axes=options.stack_axes, merge_dims=options.merge_dims, stack=stack)
        return view, tuple(range(len(view.sides)))
    view = matrix_view(shape, names, stack_axes=options.stack_axes, fold_axes=options.fold_axes, stack=stack)
    if treatment.side in ("both", "short"):
        return view, (0, 1) if treatment.side == "both" else (0,)
    return view, (view.sides.index((min if treatment.side == "left" else max)(view.sides)),)


def _phases(blocks: int, owners: int, options: Options) -> int:
    """Return the number of phases: by default as few as let each owner solve for one block at a time.

    With more, a few owners would solve in every step while all others wait for them. The host waits for nobody, so
    that its work is spread over all steps.
    """
    if options.refresh == "host":
        return options.interval
    return options.phases or min(options.interval, max(1, math.ceil(blocks / owners)))


def _buckets(
    grouped: Mapping[_Key, Sequence[Leaf]], owners: int, platform: str, options: Options
) -> tuple[Bucket, ...]:
    keys = sorted(grouped)
    counts = [sum(leaf.tiling.blocks for leaf in grouped[key]) for key in keys]
    bucket = np.repeat(np.arange(len(keys)), counts)
    # Blocks of different parameters have the same holder if their shards are on the same devices.
    holders: dict[tuple[Any, int], int] = {}
    holder = [
        holders.setdefault((tuple(names for _, names in leaf.tiling.sharded), shard), len(holders))
        for key in keys
        for leaf in grouped[key]
        for shard in leaf.tiling.holder.tolist()
    ]
    phases = _phases(len(bucket), owners, options)
    # Neighbours have the same shape, so that in most phases all owners solve for matrices of the same size.
    phase = np.arange(len(bucket)) * phases // max(len(bucket), 1)
    owner = assign_owners(bucket, np.asarray(holder, np.int64), phase, owners)
    result, first = [], 0
    for key, count in zip(keys, counts, strict=True):
        shape, sides, p, beta2, ridge, cut, orthogonalize, kind = key
        numbers, preconditioner = (p, beta2, ridge, cut, orthogonalize), PRECONDITIONERS[kind]
        part = [tuple(x[first : first + count].tolist()) for x in (phase, owner)]
        rest = precision_of(options.precision, platform, ridge), tuple(grouped[key]), first, owners, phases, *part
        result.append(Bucket(_name(key, options), shape, sides, *numbers, preconditioner, *rest))
        first += count
    return tuple(result)


def _title(shape: tuple[int, ...], sides: tuple[int, ...], title: str) -> str:
    """Return a text such as "128x512 p4", or "128*x512 p2" if only the marked sides are preconditioned."""
    marked = sides if len(sides) < len(shape) else ()
    return f"{'x'.join(f'{length}*' if side in marked else f'{length}' for side, length in enumerate(shape))} {title}"


def _name(key: _Key, options: Options) -> str:
    """Return a key for the state, of letters, digits, dots, dashes and underscores."""
    shape, sides, p, *numbers, kind = key
    text = "all" if len(sides) == len(shape) else "side" + "".join(map(str, sides))
    parts = ["x".join(map(str, shape)), text, f"p{p}"]
    for field, value in zip(("beta2", "ridge", "cut", "orthogonalize"), numbers, strict=True):
        if value != getattr(options, field):
            parts.append(f"{field}-{value!r}".replace("+", ""))
    return "_".join([*parts, *([] if kind == "shampoo" else [kind])])


def _check(path: str, shape: tuple[int, ...], names: Any, spec: PartitionSpec | None, mesh: Mapping[str, int]) -> None:
    if names is not None and len(names) != len(shape):
        raise ValueError(
            f"parameter {path!r}: axis_names={names} has {len(names)} entries, but shape {shape} has {len(shape)} axes."
        )
    if len(spec or ()) > len(shape):
        raise ValueError(
            f"parameter {path!r}: spec {spec} has {len(spec or ())} entries, but shape {shape} has {len(shape)} axes."
        )
    for entry in spec or ():
        for name in (entry,) if isinstance(entry, str) else entry or ():
            if name not in mesh:
                found = f"the mesh has no axis {name!r}, only {', '.join(mesh)}" if mesh else "no mesh is given"
                raise ValueError(f"parameter {path!r}: has spec {spec}, but {found}.")
