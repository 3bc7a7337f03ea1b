"""Statistics in flight, whose roots the host is still computing, in the layout of checkpoints."""

from typing import Any, NamedTuple

import jax
import numpy as np

from ..linalg.symmetric import packed_shape
from ..plan.blocks import Bucket


class InFlight(NamedTuple):
    """Statistics in flight of n blocks of a bucket.

    Attributes:
      statistics: [n, r, r] float32 per preconditioned side, packed, of gradients divided by 2^scale_log2.
      scale_log2: [n] int32, binary scale.
      age: [n] int32, number of steps in the statistics.
      stamp: [n] int32, count of accepted steps in the statistics; 0 if nothing is in flight.
    """

    statistics: tuple[Any, ...]
    scale_log2: Any
    age: Any
    stamp: Any


def in_flight_spec(bucket: Bucket, blocks: int) -> InFlight:
    """Return shapes and dtypes for a number of blocks."""
    shapes = [(blocks, *packed_shape(bucket.shape[side])) for side in bucket.sides]
    statistics = tuple(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)
    return InFlight(statistics, *[jax.ShapeDtypeStruct((blocks,), np.int32)] * 3)


def empty_bank(bucket: Bucket) -> Any:
    """Return one device's shard of a bucket in a checkpoint, with nothing in flight."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), in_flight_spec(bucket, bucket.slots.shape[1]))


def store(bank: InFlight, slot: np.ndarray, taken: InFlight) -> None:
    """Copy the blocks of a parcel into a device's shard of a checkpoint."""
    due = slot < len(bank.stamp)
    for place, stack in zip(jax.tree.leaves(bank), jax.tree.leaves(taken), strict=True):
        place[slot[due]] = stack[due]


def recalled(bank: InFlight, slots: np.ndarray, window: int) -> tuple[np.ndarray, InFlight]:
    """Return (slot, statistics) of the blocks in `slots`, padded to `window` rows as in a parcel."""

    def filled(x: np.ndarray, rest: int = 0) -> np.ndarray:
        return np.pad(x, [(0, window - len(x)), *[(0, 0)] * (x.ndim - 1)], constant_values=rest)

    return filled(slots.astype(np.int32), len(bank.stamp)), jax.tree.map(lambda x: filled(np.asarray(x)[slots]), bank)
