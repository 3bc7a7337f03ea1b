"""Parameters cut into blocks, and blocks of one shape gathered into buckets: the static plan of the optimizer.

A parameter's block shape depends on that parameter alone, never on its neighbours or on the number of devices,
so a checkpoint can name a block by path and coordinates.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import patterns
from .options import ShampooOptions, Treatment
from .views import MatrixView, matrix_view, names_by_path


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One preconditioned parameter and its place in its bucket.

    Attributes:
      index: position among the leaves of the parameter tree.
      path: the parameter's path.
      view: the parameter as [stack, rows, cols].
      pieces: how many blocks its rows and its columns are cut into.
    """

    index: int
    path: str
    view: MatrixView
    pieces: tuple[int, int]

    @property
    def blocks(self) -> int:
        """Number of blocks: stack x row pieces x column pieces, in this order."""
        return self.view.stack * self.pieces[0] * self.pieces[1]


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Blocks of one shape and one treatment: arrays [slots, rows, cols], whose slots are shared out over all devices.

    Block i of the bucket is block `first + i` of the whole plan. That number alone decides in which phase of the
    refresh interval the block is due, so that a run does not depend on the number of devices; `slots` tells its owner.

    Attributes:
      name: "rows x cols" and what else tells it from other buckets.
      rows, cols: the block's sides, padding included.
      sides: which sides are preconditioned: "both" or "rows".
      order: the p of the inverse p-th roots.
      leaves: the parameters whose blocks it holds, in order.
      first: number of blocks in the buckets before it.
      devices: number of owners.
      phases: number of steps over which the refresh of all blocks is spread.
    """

    name: str
    rows: int
    cols: int
    sides: str
    order: int
    leaves: tuple[Leaf, ...]
    first: int
    devices: int
    phases: int

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return sum(leaf.blocks for leaf in self.leaves)

    @property
    def matrices(self) -> int:
        """Number of whole matrices (each matrix of a stack counts), plus one for the empty slots."""
        return sum(leaf.view.stack for leaf in self.leaves) + 1

    @functools.cached_property
    def slots(self) -> np.ndarray:
        """[devices, slots per device] int32: the block in each slot, or `blocks` where the slot is empty.

        Block number g of the plan belongs to device (g + g // lcm(phases, devices)) % devices. Consecutive blocks then
        go to consecutive devices, and so do consecutive blocks of one phase: each device owns its share of every
        bucket (plus at most one), and its share of what is due in every phase.
        """
        number = self.first + np.arange(self.blocks)
        owner = (number + number // math.lcm(self.phases, self.devices)) % self.devices
        own = [np.flatnonzero(owner == device) for device in range(self.devices)]
        width = max(len(blocks) for blocks in own)
        slots = np.full((self.devices, width), self.blocks, np.int32)
        for device, blocks in enumerate(own):
            slots[device, : len(blocks)] = blocks
        return slots

    @functools.cached_property
    def slot_of_block(self) -> np.ndarray:
        """[blocks] int32: where each block lies in the flattened `slots`."""
        return np.argsort(self.slots.reshape(-1), kind="stable")[: self.blocks].astype(np.int32)

    @functools.cached_property
    def due(self) -> np.ndarray:
        """[devices, phases, window] int32: slots (of the device) due in each phase, filled up with slots per device."""
        width = self.slots.shape[1]
        rows = [
            [
                [
                    slot
                    for slot in range(width)
                    if slots[slot] < self.blocks and (self.first + slots[slot]) % self.phases == phase
                ]
                for phase in range(self.phases)
            ]
            for slots in self.slots.tolist()
        ]
        window = max(len(phase) for device in rows for phase in device)
        return np.array([[phase + [width] * (window - len(phase)) for phase in device] for device in rows], np.int32)

    def matrix_of_slot(self) -> np.ndarray:
        """[devices * slots] int32: which matrix each slot's block belongs to; empty slots belong to the last."""
        ids, first = [], 0
        for leaf in self.leaves:
            ids.append(first + np.repeat(np.arange(leaf.view.stack), leaf.pieces[0] * leaf.pieces[1]))
            first += leaf.view.stack
        return np.concatenate([*ids, [first]]).astype(np.int32)[self.slots.reshape(-1)]

    def real_sizes(self) -> np.ndarray:
        """[devices * slots, 2] int32: how many rows and columns of each slot's block are not padding."""
        sizes = []
        for leaf in self.leaves:
            sides = [
                np.clip(whole - part * np.arange(count), 0, part)
                for whole, part, count in (
                    (leaf.view.rows, self.rows, leaf.pieces[0]),
                    (leaf.view.cols, self.cols, leaf.pieces[1]),
                )
            ]
            grid = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 2)
            sizes.append(np.tile(grid, (leaf.view.stack, 1)))
        return np.concatenate([*sizes, np.zeros((1, 2))]).astype(np.int32)[self.slots.reshape(-1)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every parameter's treatment: in a bucket, or diagonal.

    Attributes:
      buckets: the buckets, ordered by name.
      diagonal: indices of the leaves under diagonal treatment.
      treatments: path -> a short text for tables.
    """

    buckets: tuple[Bucket, ...]
    diagonal: tuple[int, ...]
    treatments: dict[str, str]


def cut(side: int, block_size: int) -> tuple[int, int]:
    """Cut a side into equal parts: (number of parts, length of each with padding).

    The length is rounded up to a multiple of 8 and of 1/16 of its power of two, which keeps the number of
    different shapes small for at most one part in sixteen of padding.
    """
    pieces = math.ceil(side / block_size)
    length = math.ceil(side / pieces)
    granule = max(8, 2 ** (length.bit_length() - 1) // 16)
    rounded = math.ceil(length / granule) * granule
    # Never beyond the block size itself: a longer part could leave the last block empty.
    return pieces, max(length, min(rounded, math.ceil(block_size / 8) * 8))


def make_plan(params: Any, axis_names: Any, options: ShampooOptions, devices: int) -> Plan:
    """Decide the treatment of every parameter and gather blocks into buckets.

    Args:
      params: tree of arrays or ShapeDtypeStructs.
      axis_names: None, or a tree shaped like params whose leaves are tuples with one name (or None) per axis.
      options: treatments, block size, exponent.
      devices: number of owners.

    Raises:
      ValueError: a path that no treatment covers, or axis names that do not fit a parameter.
    """
    leaves = jax.tree.leaves(params)
    names = names_by_path(axis_names)
    rules = [(pattern, Treatment.parse(text)) for pattern, text in options.treatments]
    grouped: dict[tuple[int, int, str, int], list[Leaf]] = {}
    diagonal: list[int] = []
    treatments: dict[str, str] = {}
    for index, (path, leaf) in enumerate(zip(patterns.paths(params), leaves, strict=True)):
        treatment = patterns.first_match(rules, path)
        view = matrix_view(
            leaf.shape,
            names[path] if names else None,
            stack_axes=options.stack_axes,
            fold_axes=options.fold_axes,
            stack=min(treatment.stack, len(leaf.shape)),
        )
        if treatment.kind == "diagonal" or not view.is_matrix:
            diagonal.append(index)
            treatments[path] = f"diagonal ({options.graft})"
            continue
        block_size = treatment.block_size or options.block_size
        (row_pieces, rows), (col_pieces, cols) = cut(view.rows, block_size), cut(view.cols, block_size)
        sides = "both" if treatment.kind == "shampoo" else "rows"
        order = options.root_order(treatment, 2 if sides == "both" else 1)
        entry = Leaf(index, path, view, (row_pieces, col_pieces))
        grouped.setdefault((rows, cols, sides, order), []).append(entry)
        treatments[path] = f"{treatment.kind} {rows}x{cols} x{entry.blocks}"
    phases = 1 if options.refresh == "periodic" else options.interval
    buckets: list[Bucket] = []
    first = 0
    for (rows, cols, sides, order), members in sorted(grouped.items()):
        name = f"{rows}x{cols}_{sides}_p{order}"
        buckets.append(Bucket(name, rows, cols, sides, order, tuple(members), first, devices, phases))
        first += buckets[-1].blocks
    return Plan(tuple(buckets), tuple(diagonal), treatments)


def to_blocks(x: jax.Array, leaf: Leaf, bucket: Bucket) -> jax.Array:
    """A parameter-shaped array as its blocks, [leaf.blocks, rows * cols] float32, zeros in the padding."""
    view, (row_pieces, col_pieces) = leaf.view, leaf.pieces
    x = jnp.transpose(x.astype(jnp.float32), view.order).reshape(view.stack, view.rows, view.cols)
    padding = (row_pieces * bucket.rows - view.rows, col_pieces * bucket.cols - view.cols)
    x = jnp.pad(x, ((0, 0), (0, padding[0]), (0, padding[1])))
    x = x.reshape(view.stack, row_pieces, bucket.rows, col_pieces, bucket.cols)
    return x.transpose(0, 1, 3, 2, 4).reshape(leaf.blocks, bucket.rows * bucket.cols)


def from_blocks(blocks: jax.Array, leaf: Leaf, bucket: Bucket) -> jax.Array:
    """The inverse of `to_blocks`, float32."""
    view, (row_pieces, col_pieces) = leaf.view, leaf.pieces
    x = blocks.reshape(view.stack, row_pieces, col_pieces, bucket.rows, bucket.cols).transpose(0, 1, 3, 2, 4)
    x = x.reshape(view.stack, row_pieces * bucket.rows, col_pieces * bucket.cols)[:, : view.rows, : view.cols]
    x = x.reshape([view.shape[axis] for axis in view.order])
    return jnp.transpose(x, [int(axis) for axis in np.argsort(view.order)])
