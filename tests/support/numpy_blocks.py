"""Blocks and tiles in NumPy, by loops over what the words mean: what the fast code is compared with."""

import itertools
import math

import numpy as np


def numbered(shape, first=1):
    """An array whose elements are numbered in row-major order; none is zero, so padding shows."""
    return np.arange(first, first + math.prod(shape), dtype=np.float32).reshape(shape)


def cut(x, view, pieces, block):
    """[stack x pieces, *block]: every matrix (or tensor) of the stack in pieces, in row-major order, zero-padded."""
    dropped = [axis for axis in range(x.ndim) if axis not in view.stack and not any(axis in s for s in view.sides)]
    order = [*dropped, *view.stack, *itertools.chain(*view.sides)]
    lengths = [math.prod(x.shape[axis] for axis in side) for side in view.sides]
    stack = x.transpose(order).reshape(-1, *lengths)
    blocks = []
    for matrix in stack:
        for at in np.ndindex(*pieces):
            part = matrix[tuple(slice(i * length, (i + 1) * length) for i, length in zip(at, block, strict=True))]
            blocks.append(np.zeros(block, x.dtype))
            blocks[-1][tuple(slice(n) for n in part.shape)] = part
    return np.stack(blocks)


def shards(x, sharded, mesh):
    """The shards of a parameter, row-major over its sharded axes, given as (axis, mesh axes) pairs."""
    pieces = [x]
    for axis, names in sharded:
        count = math.prod(mesh[name] for name in names)
        pieces = [part for piece in pieces for part in np.split(piece, count, axis=axis)]
    return pieces


def tiles(x, tiling):
    """[shards, tiles, *tile]: every shard cut into tiles; sides that are not sharded are padded to whole blocks."""
    result = []
    for shard in shards(x, tiling.sharded, tiling.mesh):
        counts = []
        for side, tile, pieces in zip(tiling.view.sides, tiling.tile, tiling.pieces, strict=True):
            is_sharded = any(axis in side for axis, _ in tiling.sharded)
            counts.append(math.prod(shard.shape[axis] for axis in side) // tile if is_sharded else pieces)
        result.append(cut(shard, tiling.view, counts, tiling.tile))
    return np.stack(result)
