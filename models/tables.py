"""Embedding tables concatenated to one array, sharded by rows over all devices, and a lookup by two all-to-alls.

Each device divides the distinct rows that its examples look up by owner. One all-to-all sends their numbers to the
owners, another returns the rows; gradients of rows take the first way. Lookups, rows and bytes per device fall with the
number of devices.

Shapes: R rows of all tables, D their width, B batch, S lookups of an example, P devices that share the rows, N lookups
of a device, C places of a message to one device, U room for the rows in use on a device.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from .layout import SLICE_AXIS

ROW_AXES = ("data", "fsdp", "tensor")  # mesh axes that shard the rows, in this order
BATCH_AXES = ("data", "fsdp")  # those of them that shard the batch
_BITS = 11
_STRIPS = 2**_BITS  # the number of rows is rounded up to a multiple, so that any usual number of devices divides it
_DEVIATIONS = 4  # places of a message beyond the mean, in standard deviations of rows that are dealt at random
_ROOM_DEVIATIONS = 8  # the same of U, beyond which a step is refused: of hashed rows, one in 10^12 or rarer
_SMALL = 2**20  # bytes of an array that is cheaper to gather than to look up by messages


def total_rows(sizes: Sequence[int]) -> int:
    """Return the number of rows of the array that holds tables of these sizes."""
    return math.ceil(sum(sizes) / _STRIPS) * _STRIPS


def row_numbers(categories_BxFx: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """Return the rows, int32 shaped like the categories' 32-bit hashes: each hash modulo the size of its table.

    Neighbouring rows of a table are far apart in the array, so that every device owns a part of each table: small
    tables are looked up most.
    """
    of_table = (len(sizes), *[1] * (categories_BxFx.ndim - 2))
    starts = np.cumsum([0, *sizes[:-1]], dtype=np.int64).astype(np.int32).reshape(of_table)
    within_BxFx = categories_BxFx.astype(jnp.uint32) % np.asarray(sizes, np.uint32).reshape(of_table)
    number_BxFx = within_BxFx.astype(jnp.int32) + starts
    return number_BxFx // _STRIPS + _mirrored(number_BxFx % _STRIPS) * (total_rows(sizes) // _STRIPS)


def initial_tables(key: jax.Array, sizes: Sequence[int], width: int) -> jax.Array:
    """Return initial values, float32 [R, D], uniform between -1 / sqrt(n) and 1 / sqrt(n) for a table of n rows."""
    row_Rx1 = lax.broadcasted_iota(jnp.int32, (total_rows(sizes), 1), 0)
    strip = total_rows(sizes) // _STRIPS
    number_Rx1 = row_Rx1 % strip * _STRIPS + _mirrored(row_Rx1 // strip)
    bound_Rx1 = jnp.zeros(row_Rx1.shape, jnp.float32)
    start = 0
    for size in sizes:
        own = (number_Rx1 >= start) & (number_Rx1 < start + size)
        bound_Rx1 = jnp.where(own, size**-0.5, bound_Rx1)
        start += size
    return bound_Rx1 * jax.random.uniform(key, (total_rows(sizes), width), minval=-1, maxval=1)


def _mirrored(strip: jax.Array) -> jax.Array:
    """Return the numbers of strips with their bits in reverse order; it is its own inverse."""
    return sum((strip >> bit & 1) << (_BITS - 1 - bit) for bit in range(_BITS))  # type: ignore


def look_up(table_RxD: jax.Array, rows_BxS: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return rows of the array, [B, S, D] in `dtype`, with the batch sharded over the mesh of the context.

    Row R stands for none: it is not sent, and the caller must not use what is found, nor give it a gradient.

    The rows must be sharded over all of `ROW_AXES`. Without a mesh, for an array of at most a megabyte, or if the axes
    do not divide the rows or the batch, it is an ordinary lookup, for which XLA gathers the array. Both give the same
    rows bitwise; gradients differ by rounding, because they are summed on the device of the examples first.
    """
    exchange = _exchange_of(table_RxD.shape[0], rows_BxS.shape[0])
    if exchange is None or table_RxD.size * table_RxD.dtype.itemsize <= _SMALL:
        return table_RxD[rows_BxS].astype(dtype)
    found: jax.Array = _exchanged(table_RxD, rows_BxS, jnp.dtype(dtype), exchange)
    return found


class Used(NamedTuple):
    """The rows of the array that a batch looks up.

    Attributes:
      rows: int32 [P U], each row once; part p has rows of part p of the array. Places that are left over hold R.
      place: int32 [B, S], place of the row of each lookup in `rows`.
      filled: float32, rows on the device that has most of them / U; above 1 some are missing.
    """

    rows: jax.Array
    place: jax.Array
    filled: jax.Array


def used(rows_BxS: jax.Array, total: int, axes: Sequence[str]) -> Used:
    """Return the rows that a batch looks up, of an array of `total` rows sharded over `axes`, those of `look_up`.

    Row R stands for none, and so does the place P U.

    U is the mean for different rows that are dealt at random, and eight standard deviations. Equal rows leave room.

    Raises:
      ValueError: the axes are others.
    """
    exchange = _exchange_of(total, rows_BxS.shape[0])
    shared = exchange.shared if exchange else ()
    if shared != tuple(axes):
        raise ValueError(
            f"config.sharding_rules: the rows of tables are sharded over {tuple(axes)}, but sparse updates need "
            f"{shared} here. Use ('rows', {ROW_AXES}), and a number of devices that divides {_STRIPS}."
        )
    if exchange is None:
        distinct = _distinct(rows_BxS.ravel(), total, 1)
        rows = distinct.rows[:total]
        place_BxS = jnp.where(rows_BxS < total, distinct.place.reshape(rows_BxS.shape), len(rows))
        return Used(rows, place_BxS, jnp.float32(0))
    room = min(total // exchange.owners, exchange.places(rows_BxS.size, _ROOM_DEVIATIONS))

    def local(rows_bxS: jax.Array) -> tuple[jax.Array, ...]:
        rows_N = exchange.own(rows_bxS.ravel(), total)
        lookups, places = len(rows_N), exchange.places(len(rows_N))
        distinct_N, place_N, _, bounds = _distinct(rows_N, total, exchange.owners)
        rounds = -(-lax.pmax(jnp.diff(bounds).max(), exchange.everyone) // places)

        def ask(number: jax.Array, done: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            asked, used_U, count = done
            ask_PxC = distinct_N.at[_sent(bounds, number, places, lookups)].get(mode="fill", fill_value=total)
            asked_PxC = exchange.swap(ask_PxC)
            every = lax.all_gather(asked_PxC, exchange.slices) if exchange.slices else asked_PxC
            ordered, place = _ranked(jnp.concatenate([used_U, every.ravel()]))
            used_U = jnp.full_like(used_U, total).at[place].set(ordered, mode="drop")
            # The last of the different numbers may stand for none.
            return asked.at[number].set(asked_PxC), used_U, jnp.maximum(count, place[-1] + (ordered[-1] < total))

        def answer(number: jax.Array, found_N: jax.Array) -> jax.Array:
            there_PxC = (
                jnp.searchsorted(used_U, asked[number]).astype(jnp.int32) + lax.axis_index(exchange.shared) * room
            )
            return found_N.at[_sent(bounds, number, places, lookups)].set(exchange.swap(there_PxC), mode="drop")

        asked = jnp.zeros((-(-lookups // places), exchange.owners, places), jnp.int32)
        start = asked, jnp.full(room, total, jnp.int32), jnp.int32(0)
        asked, used_U, count = lax.fori_loop(0, rounds, ask, start)
        none_N = jnp.full_like(rows_N, room * exchange.owners)
        place_N = lax.fori_loop(0, rounds, answer, none_N)[place_N]
        if exchange.copies:
            place_N = lax.all_gather(place_N, exchange.copies, tiled=True)
        filled = lax.pmax(count, exchange.everyone) / room
        return used_U, place_N[: rows_bxS.size].reshape(rows_bxS.shape), filled

    batch = P(exchange.batch or None)
    out = P(exchange.shared), batch, P()
    return Used(*jax.shard_map(local, in_specs=batch, out_specs=out, check_vma=False)(rows_BxS))


def _exchange_of(total: int, examples: int) -> "_Exchange | None":
    """Return how the devices of the mesh of the context look up rows of each other; None if they do not."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1 and axis not in mesh.manual_axes}
    shared = tuple(axis for axis in ROW_AXES if axis in sizes)
    # Each slice holds the whole table and looks up its own part of the batch.
    batch = tuple(axis for axis in (SLICE_AXIS, *BATCH_AXES) if axis in sizes)
    parts, batch_parts = (math.prod(sizes[axis] for axis in axes) for axes in (shared, batch))
    if parts == 1 or total % parts or examples % batch_parts:
        return None
    return _Exchange(shared, batch, parts)


@dataclasses.dataclass(frozen=True)
class _Exchange:
    """The axes of a lookup.

    Attributes:
      shared: mesh axes that shard the rows.
      batch: mesh axes that shard the batch.
      owners: number of devices that share the rows.
    """

    shared: tuple[str, ...]
    batch: tuple[str, ...]
    owners: int

    @property
    def copies(self) -> tuple[str, ...]:
        """Return the axes whose devices have the same examples; they divide the lookups."""
        return tuple(axis for axis in self.shared if axis not in self.batch)

    @property
    def slices(self) -> tuple[str, ...]:
        """Return the axes whose devices have the same rows."""
        return tuple(axis for axis in self.batch if axis not in self.shared)

    @property
    def everyone(self) -> tuple[str, ...]:
        """Return all axes."""
        return (*self.slices, *self.shared)

    @property
    def everywhere(self) -> P:
        """Return the spec of an array of which each device has its own part."""
        return P((*self.batch, *self.copies))

    def own(self, x_Mx: jax.Array, fill: int) -> jax.Array:
        """Return the part [N, ...] of an array of the device's examples that it handles, padded with `fill`."""
        count = lax.axis_size(self.copies) if self.copies else 1
        part = -(-x_Mx.shape[0] // count)
        padded = jnp.pad(x_Mx, [(0, part * count - x_Mx.shape[0])] + [(0, 0)] * (x_Mx.ndim - 1), constant_values=fill)
        return lax.dynamic_slice_in_dim(padded, lax.axis_index(self.copies) * part, part) if self.copies else padded

    def places(self, lookups: int, deviations: int = _DEVIATIONS) -> int:
        """Return C. A device with more rows for one owner needs further rounds."""
        mean = lookups / self.owners
        return min(lookups, math.ceil(mean + deviations * math.sqrt(mean)))

    def swap(self, x_PxCx: jax.Array) -> jax.Array:
        """Send part p to device p; return the parts from all devices."""
        return lax.all_to_all(x_PxCx, self.shared, 0, 0)


class _Distinct(NamedTuple):
    """The distinct rows that a device looks up.

    Attributes:
      rows: int32 [N], in increasing order, then R.
      place: int32 [N], number of the distinct row of each lookup.
      firsts: int32 [P + 1], first row of each owner, and the end of the last one's.
      bounds: int32 [P + 1], number of the first distinct row of each owner, and the end of the last one's.
    """

    rows: jax.Array
    place: jax.Array
    firsts: jax.Array
    bounds: jax.Array


def _distinct(rows_N: jax.Array, total: int, owners: int) -> _Distinct:
    sorted_N, number_N = _ranked(rows_N)
    distinct_N = jnp.full_like(rows_N, total).at[number_N].set(sorted_N)
    firsts = total // owners * jnp.arange(owners + 1, dtype=jnp.int32)
    bounds, place_N = (jnp.searchsorted(distinct_N, wanted).astype(jnp.int32) for wanted in (firsts, rows_N))
    return _Distinct(distinct_N, place_N, firsts, bounds)


def _ranked(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return rows in increasing order, and the number of different ones before each."""
    # On CPUs XLA sorts one array six times faster than keys with their places.
    ordered = lax.sort(rows, is_stable=False)
    new = jnp.concatenate([jnp.zeros(1, bool), ordered[1:] != ordered[:-1]])
    return ordered, jnp.cumsum(new, dtype=jnp.int32)


class _Requests(NamedTuple):
    """The distinct rows that a device looks up, and those that are asked of it.

    Attributes:
      place: int32 [N], number of the distinct row of each lookup.
      bounds: int32 [P + 1], number of the first distinct row of each owner, and the end of the last one's.
      rounds: int32 [1], number of messages to each owner, equal on all devices.
      asked: int32 [most rounds, P, C], rows that each device asks of this one, from its first one; r in empty places.
    """

    place: jax.Array
    bounds: jax.Array
    rounds: jax.Array
    asked: jax.Array

    def sent(self, number: jax.Array) -> jax.Array:
        """Return the numbers of the distinct rows of the message of a round to each owner, [P, C]; N for none."""
        return _sent(self.bounds, number, self.asked.shape[-1], len(self.place))


def _sent(bounds: jax.Array, number: jax.Array, places: int, none: int) -> jax.Array:
    at_PxC = bounds[:-1, None] + number * places + jnp.arange(places)
    return jnp.where(at_PxC < bounds[1:, None], at_PxC, none)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _exchanged(table_RxD: jax.Array, rows_BxS: jax.Array, dtype: jnp.dtype, exchange: _Exchange) -> jax.Array:
    return _forward(table_RxD, rows_BxS, dtype, exchange)[0]


def _forward(
    table_RxD: jax.Array, rows_BxS: jax.Array, dtype: jnp.dtype, exchange: _Exchange
) -> tuple[jax.Array, tuple[_Requests, jax.Array]]:
    total, width = table_RxD.shape

    def local(own_rxD: jax.Array, rows_bxS: jax.Array) -> tuple[jax.Array, _Requests]:
        size = len(own_rxD)
        rows_N = exchange.own(rows_bxS.ravel(), total)
        lookups, places = len(rows_N), exchange.places(len(rows_N))
        distinct_N, place_N, firsts, bounds = _distinct(rows_N, total, exchange.owners)
        rounds = -(-lax.pmax(jnp.diff(bounds).max(), exchange.shared) // places)

        def turn(number: jax.Array, done: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            asked, found_NxD = done
            sent_PxC = _sent(bounds, number, places, lookups)
            ask_PxC = distinct_N.at[sent_PxC].get(mode="fill", fill_value=total) - firsts[:-1, None]
            asked_PxC = exchange.swap(jnp.minimum(ask_PxC, size))
            rows_PxCxD = own_rxD.at[asked_PxC].get(mode="fill", fill_value=0).astype(dtype)
            found_NxD = found_NxD.at[sent_PxC].set(exchange.swap(rows_PxCxD), mode="drop")
            return asked.at[number].set(asked_PxC), found_NxD

        asked = jnp.full((-(-lookups // places), exchange.owners, places), size, jnp.int32)
        found_NxD = jnp.zeros((lookups, width), dtype)
        asked, found_NxD = lax.fori_loop(0, rounds, turn, (asked, found_NxD))
        found_NxD = found_NxD[place_N]
        if exchange.copies:
            found_NxD = lax.all_gather(found_NxD, exchange.copies, tiled=True)
        found_bxSxD = found_NxD[: rows_bxS.size].reshape(*rows_bxS.shape, width)
        return found_bxSxD, _Requests(place_N, bounds, rounds[None], asked)

    batch = P(exchange.batch or None)
    found, requests = jax.shard_map(
        local,
        in_specs=(P(exchange.shared), batch),
        out_specs=(batch, exchange.everywhere),
        check_vma=False,
    )(table_RxD, rows_BxS)
    return found, (requests, table_RxD)


def _backward(
    dtype: jnp.dtype, exchange: _Exchange, kept: tuple[_Requests, jax.Array], g_BxSxD: jax.Array
) -> tuple[jax.Array, None]:
    def local(requests: _Requests, like_rxD: jax.Array, g_bxSxD: jax.Array) -> jax.Array:
        g_NxD = exchange.own(g_bxSxD.reshape(-1, g_bxSxD.shape[-1]), 0).astype(like_rxD.dtype)
        sums_NxD = jnp.zeros_like(g_NxD).at[requests.place].add(g_NxD).astype(dtype)

        def turn(number: jax.Array, gradient_rxD: jax.Array) -> jax.Array:
            sent_PxCxD = sums_NxD.at[requests.sent(number)].get(mode="fill", fill_value=0)
            received_PxCxD = exchange.swap(sent_PxCxD).astype(like_rxD.dtype)
            return gradient_rxD.at[requests.asked[number]].add(received_PxCxD, mode="drop")

        gradient_rxD = lax.fori_loop(0, requests.rounds[0], turn, jnp.zeros_like(like_rxD))
        return lax.psum(gradient_rxD, exchange.slices) if exchange.slices else gradient_rxD

    gradient = jax.shard_map(
        local,
        in_specs=(exchange.everywhere, P(exchange.shared), P(exchange.batch or None)),
        out_specs=P(exchange.shared),
        check_vma=False,
    )(*kept, g_BxSxD)
    return gradient, None


_exchanged.defvjp(_forward, _backward)
