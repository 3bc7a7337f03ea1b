"""Two checkpoints compared, array by array; the blocks of the optimizer by parameter and block.

So the same state saved on eight devices and on two is equal, though its blocks lie in other slots. Of large arrays
only one of each checkpoint is in memory at a time.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ...optimizers.checkpoint.manifest import ELEMENTWISE, Blocks
from . import store
from .inspect import Contents
from .store import OPTIMIZER

_CHUNK = 2**22  # elements whose difference is taken at a time, in float64
_BATCH = 2**28  # bytes that small arrays are read together up to
_BUCKETS = f"{OPTIMIZER}buckets/"
_PER_SIDE = ("roots/statistics", "roots/roots", "in_flight/statistics")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found of one array.

    Attributes:
      name: its path in the train state; of blocks, the field and the parameter.
      only_in: "A" or "B" where the other one has none, otherwise "".
      difference: for people; "" where both hold the same bits.
    """

    name: str
    only_in: str = ""
    difference: str = ""

    @property
    def equal(self) -> bool:
        """Whether both have it, with the same bits."""
        return not self.only_in and not self.difference


class _Part(NamedTuple):
    """The blocks of one parameter in one array of a bucket."""

    array: str
    blocks: Blocks


class _Pair(NamedTuple):
    """An array of A and one of B, and what is to be found of them, given both."""

    a: str
    b: str
    find: Callable[[np.ndarray, np.ndarray], list[Finding]]


def compare(a: Contents, b: Contents) -> Iterator[Finding]:
    """Everything that either checkpoint holds: what only one has, arrays by path, blocks.

    Raises:
      UserError: an array cannot be read.
    """
    alone, pairs = _by_name(a, b)
    if a.blocks is not None and b.blocks is not None:
        more_alone, more_pairs = _by_block(a, b)
        alone, pairs = alone + more_alone, pairs + more_pairs
    yield from alone
    for batch in _batches(pairs, a, b):
        arrays_a = store.read(a.path, {pair.a: None for pair in batch})
        arrays_b = store.read(b.path, {pair.b: None for pair in batch})
        for pair in batch:
            yield from pair.find(arrays_a[pair.a], arrays_b[pair.b])


def _batches(pairs: Sequence[_Pair], a: Contents, b: Contents) -> Iterator[list[_Pair]]:
    """Pairs in turn: as many small arrays as fit together, large ones alone. Every reading has a cost of its own."""
    batch, size = [], 0
    for pair in pairs:
        needed = a.arrays[pair.a].bytes + b.arrays[pair.b].bytes
        if batch and size + needed > _BATCH:
            yield batch
            batch, size = [], 0
        batch, size = [*batch, pair], size + needed
    if batch:
        yield batch


def _by_name(a: Contents, b: Contents) -> tuple[list[Finding], list[_Pair]]:
    """What only one has, and the pairs, of all arrays but those of blocks where both have blocks."""
    blocks = a.blocks is not None and b.blocks is not None
    alone, pairs = [], []
    for name in sorted(a.arrays.keys() | b.arrays.keys()):
        there, here = a.arrays.get(name), b.arrays.get(name)
        if blocks and name.startswith(_BUCKETS):
            continue
        if there is None or here is None:
            alone.append(Finding(name, "A" if here is None else "B"))
        elif str(there) != str(here):
            alone.append(Finding(name, difference=f"{there} in A, {here} in B"))
        else:
            pairs.append(_Pair(name, name, functools.partial(_find_by_name, name)))
    return alone, pairs


def _find_by_name(name: str, a: np.ndarray, b: np.ndarray) -> list[Finding]:
    return [Finding(name, difference=_difference(a, b))]


def _by_block(a: Contents, b: Contents) -> tuple[list[Finding], list[_Pair]]:
    """The same of the blocks: each field of each parameter is one finding."""
    parts_a, parts_b = _parts(a), _parts(b)
    alone = [Finding(_name(*key), "A" if key in parts_a else "B") for key in sorted(parts_a.keys() ^ parts_b.keys())]
    keys: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for key in sorted(parts_a.keys() & parts_b.keys()):
        keys.setdefault((parts_a[key].array, parts_b[key].array), []).append(key)

    def find(keys: Sequence[tuple[str, str]], stack_a: np.ndarray, stack_b: np.ndarray) -> list[Finding]:
        return [
            Finding(
                _name(*key), difference=_of_blocks(key[0], stack_a, parts_a[key].blocks, stack_b, parts_b[key].blocks)
            )
            for key in keys
        ]

    return alone, [_Pair(*arrays, functools.partial(find, same)) for arrays, same in keys.items()]


def _of_blocks(field: str, stack_a: np.ndarray, a: Blocks, stack_b: np.ndarray, b: Blocks) -> str:
    """How a parameter's blocks [slots, ...] differ in a field."""
    if stack_a.dtype != stack_b.dtype:
        return f"{stack_a.dtype.name} in A, {stack_b.dtype.name} in B"
    if a.geometry == b.geometry:
        return _difference(stack_a[a.slots], stack_b[b.slots], blocks=True)
    if field in ELEMENTWISE and a.view.shape == b.view.shape:
        return _difference(a.joined(stack_a), b.joined(stack_b))
    return f"blocks of {_cut(a)} in A, of {_cut(b)} in B"


def _parts(contents: Contents) -> dict[tuple[str, str], _Part]:
    """(field, path of a parameter) -> its blocks. Arrays of preconditioned sides are known by the side's number."""
    parts = {}
    for bucket in contents.blocks.buckets.values() if contents.blocks else ():
        prefix = f"{_BUCKETS}{bucket.name}/"
        for array in contents.arrays:
            field = array.removeprefix(prefix)
            if not array.startswith(prefix) or field == "block":
                continue
            head, _, number = field.rpartition("/")
            if head in _PER_SIDE:
                field = f"{head} of side {bucket.sides[int(number)]}"
            parts |= {(field, path): _Part(array, blocks) for path, blocks in bucket.blocks.items()}
    return parts


def _name(field: str, path: str) -> str:
    return f"{OPTIMIZER}{field} of {path}"


def _cut(blocks: Blocks) -> str:
    pieces, shape = ("x".join(map(str, numbers)) for numbers in (blocks.pieces, blocks.shape))
    return f"{shape}, {pieces} to a matrix"


def _difference(a: np.ndarray, b: np.ndarray, *, blocks: bool = False) -> str:
    """How two arrays of one shape and dtype differ, "" where they hold the same bits.

    Args:
      a: the first.
      b: the second.
      blocks: whether axis 0 numbers blocks.
    """
    a, b = (np.ascontiguousarray(x).reshape(len(x) if blocks and x.ndim else 1, -1) for x in (a, b))
    differing, rows, largest, squares, whole = 0, 0, 0.0, 0.0, 0.0
    for row_a, row_b in zip(a, b, strict=True):
        before = differing
        for start in range(0, len(row_a), _CHUNK):
            x, y = row_a[start : start + _CHUNK], row_b[start : start + _CHUNK]
            unlike = (x.view(np.uint8) != y.view(np.uint8)).reshape(len(x), -1).any(axis=1)
            differing += int(unlike.sum())
            with np.errstate(all="ignore"):
                x64, y64 = x.astype(np.float64), y.astype(np.float64)
                # Equal bits are no difference even where they are no number.
                gap = np.where(unlike, np.abs(y64 - x64), 0.0)
                largest = float(np.maximum(largest, gap.max(initial=0.0)))
                squares += float(np.square(gap).sum())
                whole += float(np.square(x64).sum())
        rows += differing > before
    if not differing:
        return ""
    relative = float(np.sqrt(np.float64(squares) / np.float64(whole))) if whole else float("inf")
    within = f" in {rows:,} of {len(a):,} blocks" if blocks else ""
    return (
        f"{differing:,} of {a.size:,} elements{within} differ, by at most {largest:.3g}; "
        f"norm of the difference {relative:.3g} of A's"
    )
