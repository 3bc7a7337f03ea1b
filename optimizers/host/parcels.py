"""Parcels: the blocks of one phase, sent to the host as statistics and back as roots.

A parcel is one int32 array per device, with floats as bits, so that a transfer is one call per device. Statistics are
copied to a parcel that is never donated, so that threads can read it while the train step reuses the state's memory.
The two programs have no collectives, except that all slices install the first slice's roots: another kind of CPU rounds
differently, and parameters would drift apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..exchange import Owners
from ..linalg.roots import RootResult
from ..options import Options
from ..plan.blocks import Bucket
from ..preconditioners.base import PreconditionerState
from ..promotion import standard_promotion
from ..refresh import due_phases, install
from .in_flight import InFlight, in_flight_spec


class Parcels:
    """The programs that read statistics and install roots of a plan's buckets, and the layout of parcels."""

    def __init__(self, buckets: Sequence[Bucket], owners: Owners, options: Options):
        self.buckets = [bucket for bucket in buckets if bucket.sides]
        self.owners = owners
        self._options = options
        self._taken = {b.name: (_ints(self.window(b)), in_flight_spec(b, self.window(b))) for b in self.buckets}
        self._answers = {b.name: _answer(b, self.window(b)) for b in self.buckets}
        self.take = jax.jit(standard_promotion()(self._take))
        self.install = jax.jit(standard_promotion()(self._install), donate_argnums=0)

    def window(self, bucket: Bucket) -> int:
        """Return the largest number of a bucket's blocks due on one device in one phase."""
        return bucket.due.shape[2]

    def taken(self, parcel: Any) -> dict[str, tuple[Any, InFlight]]:
        """Split a device's shard [m] of a parcel of statistics; return bucket name -> (slots, statistics), as views."""
        return _parts(self._taken, parcel)

    def answers(self, parcel: Any) -> dict[str, tuple[Any, Any, RootResult]]:
        """Split a device's shard of a parcel of roots; return bucket name -> (slots, scale_log2, results)."""
        return _parts(self._answers, parcel)

    def empty_answer(self) -> np.ndarray:
        """Return a device's shard of a parcel of roots with no due blocks."""
        answer = np.zeros(sum(part.size for part in jax.tree.leaves(self._answers)), np.int32)
        for bucket in self.buckets:
            self.answers(answer)[bucket.name][0][:] = bucket.slots.shape[1]
        return answer

    def _take(
        self,
        states: Mapping[str, PreconditionerState],
        tables: Mapping[str, jax.Array],
        count: jax.Array,
        last: jax.Array,
        number: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Return (parcel [owners, m] of the statistics of phase `number` of those due on this step, count).

        `tables` has each bucket's `due`, sharded over the owners. The step was skipped and nothing is due if `count` is
        still `last`, that of the previous call.
        """

        def local(_: Any, owned: Any, shared: Any) -> Any:
            (states, tables), (count, last, number) = owned, shared
            first, phases = due_phases(count, self._options, self._options.interval)
            phase, due = (first + number) % self._options.interval, (count > last) & (number < phases)
            taken = {}
            for bucket in self.buckets:
                state = states[bucket.name]
                slot = jnp.where(due, tables[bucket.name][0, phase], bucket.slots.shape[1])
                kept = InFlight(state.statistics, state.scale_log2, state.age, jnp.broadcast_to(count, state.age.shape))
                taken[bucket.name] = slot, jax.tree.map(lambda x, slot=slot: x.at[slot].get(mode="clip"), kept)
            bits = [lax.bitcast_convert_type(x.ravel(), jnp.int32) for x in jax.tree.leaves(taken)]
            parcel = jnp.concatenate([jnp.zeros(0, jnp.int32), *bits])[None]
            # A new array, because the next step donates `count`.
            return {}, parcel, jnp.maximum(count, last)

        _, parcel, count = self.owners.run(local, {}, {}, (states, tables), (count, last, number))
        return parcel, count

    def _install(
        self,
        roots: Mapping[str, PreconditionerState],
        parcel: jax.Array,
        count: jax.Array,
        at: jax.Array,
        stamp: jax.Array,
    ) -> dict[str, PreconditionerState]:
        """Return the states, without statistics, with the roots of a parcel [owners, m] installed if `count` is `at`.

        `stamp` is the number of steps in the statistics that the roots were computed from.
        """

        def local(_: Any, owned: Any, shared: Any) -> Any:
            (roots, parcel), (count, at, stamp) = owned, shared
            result, parcel = {}, self.owners.of_first_slice(parcel)
            for bucket in self.buckets:
                slot, scale_log2, found = self.answers(parcel[0])[bucket.name]
                slot = jnp.where(count == at, slot, bucket.slots.shape[1])
                found = found._replace(accepted=found.accepted > 0)
                result[bucket.name] = install(roots[bucket.name], slot, found, scale_log2, stamp, bucket)
            return {}, result, ()

        return self.owners.run(local, {}, {}, (dict(roots), parcel), (count, at, stamp))[1]


def _answer(bucket: Bucket, blocks: int) -> tuple[Any, Any, RootResult]:
    roots: Any = tuple(_floats(blocks, bucket.shape[side], bucket.shape[side]) for side in bucket.sides)
    return _ints(blocks), _ints(blocks), RootResult(roots, *[_floats(blocks)] * 4, accepted=_ints(blocks))


def _floats(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, np.float32)


def _ints(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, np.int32)


def _parts(like: Any, vector: Any) -> Any:
    """Split an int32 vector into a tree of arrays with the shapes and dtypes of `like`."""
    first = 0

    def part(leaf: Any) -> Any:
        nonlocal first
        start, first = first, first + leaf.size
        if isinstance(vector, jax.Array):
            return lax.bitcast_convert_type(lax.slice(vector, (start,), (first,)), leaf.dtype).reshape(leaf.shape)
        return vector[start:first].view(leaf.dtype).reshape(leaf.shape)

    return jax.tree.map(part, like)
