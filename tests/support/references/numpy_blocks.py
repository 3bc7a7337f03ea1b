"""Cut blocks and tiles in NumPy with plain loops, as a reference for the fast code."""

import itertools
import math

import numpy as np


def numbered(shape, first=1):
    """Return an array of numbers from 1 in row-major order; no element is zero, so that padding shows."""
    return np.arange(first, first + math.prod(shape), dtype=np.float32).reshape(shape)


def cut(x, view, pieces, block):
    """Cut every matrix (or tensor) of the stack into zero-padded blocks [stack x pieces, *block], row-major."""
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
    """Return the shards of a parameter, row-major over its sharded axes, given as (axis, mesh axes) pairs."""
    pieces = [x]
    for axis, names in sharded:
        count = math.prod(mesh[name] for name in names)
        pieces = [part for piece in pieces for part in np.split(piece, count, axis=axis)]
    return pieces


def tiles(x, tiling):
    """Cut every shard into tiles [shards, tiles, *tile]; pad sides that are not sharded to whole blocks."""
    result = []
    for shard in shards(x, tiling.sharded, tiling.mesh):
        counts = []
        for side, tile, pieces in zip(tiling.view.sides, tiling.tile, tiling.pieces, strict=True):
            is_sharded = any(axis in side for axis, _ in tiling.sharded)
            counts.append(math.prod(shard.shape[axis] for axis in side) // tile if is_sharded else pieces)
        result.append(cut(shard, tiling.view, counts, tiling.tile))
    return np.stack(result)
