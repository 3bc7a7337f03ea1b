"""Compare two checkpoints array by array, and the optimizer's blocks by parameter and block.

The same state saved on eight devices and on two is therefore equal, although its blocks lie in other slots. One array
of each checkpoint is in memory at a time.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ...optimizers.checkpoint.manifest import ELEMENTWISE, Blocks
from . import store
from .inspect import Contents

_PER_SIDE = ("roots/statistics", "roots/roots", "in_flight/statistics")


class _Part(NamedTuple):
    """An array; with `blocks` only those of one parameter, in a field of a bucket."""

    array: str
    field: str = ""
    blocks: Blocks | None = None


def compare(a: Contents, b: Contents) -> Iterator[tuple[str, str]]:
    """Yield the name of everything that either checkpoint has, and the difference: "" for the same bits.

    A name is the path of an array in the train state, or a field of the blocks of a parameter.

    Raises:
      UserError: an array cannot be read.
    """
    by_block = bool(a.blocks and b.blocks)
    in_a, in_b = (_parts(each, by_block) for each in (a, b))
    read_a, read_b = (
        functools.lru_cache(1)(lambda name, path=each.path: store.read(path, {name: None})[name]) for each in (a, b)
    )
    # In the order of the arrays, so that each is read once.
    for name in sorted(in_a.keys() | in_b.keys(), key=lambda name: (in_a.get(name) or in_b[name]).array):
        there, here = in_a.get(name), in_b.get(name)
        if there is None or here is None:
            yield name, "only in A" if here is None else "only in B"
            continue
        saved_a, saved_b = a.arrays[there.array], b.arrays[here.array]
        if saved_a.dtype != saved_b.dtype or (there.blocks is None and saved_a.shape != saved_b.shape):
            yield name, f"{saved_a} in A, {saved_b} in B"
        else:
            yield name, _of_parts(there, read_a(there.array), here, read_b(here.array))


def _parts(contents: Contents, by_block: bool) -> dict[str, _Part]:
    """Return what is compared, by name. Arrays of preconditioned sides are named by the number of the side."""
    if not by_block:
        return {name: _Part(name) for name in contents.arrays}
    roots = tuple(f"{start}buckets/" for start in contents.blocks)
    parts = {name: _Part(name) for name in contents.arrays if not name.startswith(roots)}
    buckets = [(start, bucket) for start, blocks in contents.blocks.items() for bucket in blocks.buckets.values()]
    for start, bucket in buckets:
        prefix = f"{start}buckets/{bucket.name}/"
        for array in contents.arrays:
            field = array.removeprefix(prefix)
            if not array.startswith(prefix) or field == "block":
                continue
            head, _, number = field.rpartition("/")
            if head in _PER_SIDE:
                field = f"{head} of side {bucket.entry['sides'][int(number)]}"
            parts |= {
                f"{start}{field} of {path}": _Part(array, field, blocks) for path, blocks in bucket.blocks.items()
            }
    return parts


def _of_parts(a: _Part, array_a: np.ndarray, b: _Part, array_b: np.ndarray) -> str:
    if a.blocks is None or b.blocks is None:
        return _difference(array_a, array_b)
    if a.blocks.geometry == b.blocks.geometry:
        return _difference(array_a[a.blocks.slots], array_b[b.blocks.slots])
    if a.field in ELEMENTWISE and a.blocks.view.shape == b.blocks.view.shape:
        return _difference(a.blocks.joined(array_a), b.blocks.joined(array_b))
    return f"blocks of {_cut(a.blocks)} in A, of {_cut(b.blocks)} in B"


def _cut(blocks: Blocks) -> str:
    pieces, shape = ("x".join(map(str, numbers)) for numbers in (blocks.pieces, blocks.shape))
    return f"{shape}, {pieces} to a matrix"


def _difference(a: np.ndarray, b: np.ndarray) -> str:
    """Return how two arrays of one shape and dtype differ, "" if they have the same bits."""
    bits = (np.ascontiguousarray(x).reshape(x.size, 1).view(np.uint8) for x in (a, b))
    unlike = np.not_equal(*bits).any(axis=1).reshape(a.shape)
    if not unlike.any():
        return ""
    with np.errstate(all="ignore"):
        gap = b[unlike].astype(np.float64) - a[unlike].astype(np.float64)
        relative = np.linalg.norm(gap) / np.linalg.norm(a.astype(np.float64).reshape(-1))
    return (
        f"{gap.size:,} of {a.size:,} elements differ, by at most {np.abs(gap).max():.3g}; "
        f"norm of the difference {relative:.3g} of A's"
    )
