"""Compare two checkpoints array by array, and the optimizer's blocks by parameter and block.

The same state saved on eight devices and on two is therefore equal, although its blocks lie in other slots. One array
of each checkpoint is in memory at a time.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ...optimizers.checkpoint.manifest import Blocks
from . import store
from .inspect import Contents


class _Part(NamedTuple):
    """An array, or the blocks of one parameter in it."""

    array: str
    blocks: Blocks | None = None


def compare(a: Contents, b: Contents) -> Iterator[tuple[str, str]]:
    """Yield the name of everything that either checkpoint has, and the difference: "" for the same bits.

    A name is the path of an array in the train state, or a field of the blocks of a parameter.

    Raises:
      UserError: an array cannot be read.
    """
    by_block = bool(a.blocks and b.blocks)
    in_a, in_b = (_parts(each, by_block) for each in (a, b))
    read = functools.lru_cache(2)(lambda path, name: store.read(path, {name: None})[name])
    # In the order of the arrays, so that each is read once.
    for name in sorted(in_a.keys() | in_b.keys(), key=lambda name: (in_a.get(name) or in_b[name]).array):
        part_a, part_b = in_a.get(name), in_b.get(name)
        if part_a is None or part_b is None:
            yield name, "only in A" if part_b is None else "only in B"
            continue
        saved_a, saved_b, blocks_a, blocks_b = a.arrays[part_a.array], b.arrays[part_b.array], part_a[1], part_b[1]
        if blocks_a and blocks_b and blocks_a.geometry != blocks_b.geometry:
            yield name, "is cut into other blocks"
        elif saved_a.dtype != saved_b.dtype or (not blocks_a and saved_a.shape != saved_b.shape):
            yield name, f"{saved_a} in A, {saved_b} in B"
        else:
            array_a, array_b = read(a.path, part_a.array), read(b.path, part_b.array)
            if blocks_a and blocks_b:
                array_a, array_b = array_a[blocks_a.slots], array_b[blocks_b.slots]
            yield name, _difference(array_a, array_b)


def _parts(contents: Contents, by_block: bool) -> dict[str, _Part]:
    """Return what is compared, by name."""
    parts = {name: _Part(name) for name in contents.arrays}
    for start, saved in contents.blocks.items() if by_block else ():
        for bucket in saved.buckets.values():
            prefix = f"{start}buckets/{bucket.name}/"
            for array in [name for name in parts if name.startswith(prefix)]:
                field = array.removeprefix(prefix)
                del parts[array]
                if field != "block":
                    parts |= {f"{start}{field} of {path}": _Part(array, mine) for path, mine in bucket.blocks.items()}
    return parts


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
