"""Statistics whose roots the host is still computing, slot by slot, so that a checkpoint can move them with blocks."""

from typing import Any, NamedTuple

import jax
import numpy as np

from ..linalg.symmetric import packed_shape
from ..plan.blocks import Bucket


class InFlight(NamedTuple):
    """Statistics of some blocks of a bucket on their way to the host; axis 0 numbers the blocks.

    Attributes:
      statistics: per preconditioned side [n, r, r] float32, packed.
      scale_log2: [n] int32, statistics are of gradients divided by 2^scale_log2.
      stamp: [n] int32, the count of steps in them; 0 where nothing is in flight.
    """

    statistics: tuple[Any, ...]
    scale_log2: Any
    stamp: Any


def in_flight_spec(bucket: Bucket, blocks: int) -> InFlight:
    """Return shapes and types for a number of blocks."""
    shapes = [(blocks, *packed_shape(bucket.shape[side])) for side in bucket.sides]
    statistics = tuple(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)
    return InFlight(statistics, *[jax.ShapeDtypeStruct((blocks,), np.int32)] * 2)


def empty_bank(bucket: Bucket) -> Any:
    """Return one device's part of a bucket in a checkpoint, with nothing in flight."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), in_flight_spec(bucket, bucket.slots.shape[1]))


def store(bank: InFlight, slot: np.ndarray, taken: InFlight) -> None:
    """Copy one parcel's blocks into a device's part of a checkpoint."""
    due = slot < len(bank.stamp)
    for place, stack in zip(jax.tree.leaves(bank), jax.tree.leaves(taken), strict=True):
        place[slot[due]] = stack[due]


def recalled(bank: InFlight, slots: np.ndarray, window: int) -> tuple[np.ndarray, InFlight]:
    """Return the blocks in some slots as a parcel holds them: (slot, statistics), both filled up to `window` rows."""

    def filled(x: np.ndarray, rest: int = 0) -> np.ndarray:
        return np.pad(x, [(0, window - len(x)), *[(0, 0)] * (x.ndim - 1)], constant_values=rest)

    return filled(slots.astype(np.int32), len(bank.stamp)), jax.tree.map(lambda x: filled(np.asarray(x)[slots]), bank)
