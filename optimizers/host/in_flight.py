"""Statistics whose roots are still to come, as a checkpoint keeps them: slot by slot, so that they move with blocks."""

from typing import Any, NamedTuple

import jax
import numpy as np

from ..plan.blocks import Bucket
from .parcels import Contents, contents_spec


class InFlight(NamedTuple):
    """Statistics whose roots have not been installed yet, as a checkpoint keeps them; axis 0 numbers the slots.

    Attributes:
      statistics: per preconditioned side [n, r, r] float32, packed, or [n, r, rank].
      correction: [n] float32, what they are to be divided by.
      exponent: [n] int32, of the gradients they are of.
      suited: [n] int32, which factors stay as they are; see `parcels.Contents`.
      stamp: [n] int32, the count of the steps in them; 0 where nothing is in flight.
    """

    statistics: tuple[jax.Array, ...]
    correction: jax.Array
    exponent: jax.Array
    suited: jax.Array
    stamp: jax.Array


def in_flight_spec(bucket: Bucket, slots: int) -> InFlight:
    """Shapes and types of what a checkpoint keeps of a bucket."""
    spec = contents_spec(bucket, slots)
    return InFlight(tuple(spec.statistics), spec.correction, spec.exponent, spec.suited, stamp=spec.slot)


def empty_bank(bucket: Bucket) -> Any:
    """One device's part of what a checkpoint keeps of a bucket, empty."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), in_flight_spec(bucket, bucket.slots.shape[1]))


def store(bank: Any, contents: Contents, stamp: int) -> None:
    """Put what one parcel brought from a device into that device's part."""
    due = contents.slot < len(bank.stamp)
    slots = contents.slot[due]
    for place, stack in zip(bank.statistics, contents.statistics, strict=True):
        place[slots] = stack[due]
    for field in ("correction", "exponent", "suited"):
        getattr(bank, field)[slots] = getattr(contents, field)[due]
    bank.stamp[slots] = stamp


def recalled(bank: InFlight, slots: np.ndarray, sizes: np.ndarray, window: int) -> Contents:
    """Some slots of a bank as the contents of a parcel."""

    def filled(x: Any, rest: Any) -> np.ndarray:
        x = np.asarray(x)
        return np.concatenate([x, np.broadcast_to(np.asarray(rest, x.dtype), (window - len(x), *x.shape[1:]))])

    stamp = np.asarray(bank.stamp)
    return Contents(
        statistics=[filled(np.asarray(s)[slots], 0) for s in bank.statistics],
        correction=filled(np.asarray(bank.correction)[slots], 1),
        slot=filled(slots.astype(np.int32), len(stamp)),
        exponent=filled(np.asarray(bank.exponent)[slots], 0),
        suited=filled(np.asarray(bank.suited)[slots], 0),
        sizes=filled(sizes[slots], 0),
    )
