"""Statistics that live in the hosts' memory: streamed through a device a few blocks at a time, never there as a whole.

Where a backend has pinned host memory (TPU, GPU and CPU have), an array of it can be an argument and a result of a
compiled program. A loop copies a slice to the device, works on it and writes it back in place; its length is decided on
the device, so that a step that changes nothing moves nothing.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

HOST_KIND = "pinned_host"
# Of statistics that are on a device at a time.
_CHUNK_BYTES = 2**26

_DEVICE, _HOST = jax.memory.Space.Device, jax.memory.Space.Host


def to_host(x: jax.Array) -> jax.Array:
    """The array in the memory of its devices' hosts."""
    return jax.device_put(x, _HOST)


def to_device(x: jax.Array) -> jax.Array:
    """The array in its devices' own memory."""
    return jax.device_put(x, _DEVICE)


def rows(bank: jax.Array, index: jax.Array, *, on_host: bool) -> jax.Array:
    """bank[index] on the device, indices clipped to what there is.

    Args:
      bank: [n, ...].
      index: [m] int32.
      on_host: whether the bank is in host memory; then row after row is copied.
    """
    if not on_host:
        return bank.at[index].get(mode="clip")
    index = jnp.clip(index, 0, bank.shape[0] - 1)
    return lax.map(lambda i: to_device(lax.dynamic_slice_in_dim(bank, i, 1))[0], index)


def updated(
    bank: jax.Array, function: Callable[..., jax.Array], arguments: Any, *, wanted: jax.Array | bool, on_host: bool
) -> jax.Array:
    """function(bank, *arguments) where `wanted`, else the bank; row i of the result depends on rows i alone.

    Args:
      bank: [n, ...].
      function: (rows of the bank, *rows of the arguments) -> rows of the bank, of the same shape and type.
      arguments: arrays [n, ...] on the device.
      wanted: scalar.
      on_host: whether the bank is in host memory; then it is updated in place, chunk after chunk.
    """
    if not on_host:
        return jnp.where(wanted, function(bank, *arguments), bank)
    size = _chunk(bank)

    def step(number: jax.Array, bank: jax.Array) -> jax.Array:
        first = number * size
        old, *parts = (lax.dynamic_slice_in_dim(x, first, size) for x in (bank, *arguments))
        return lax.dynamic_update_slice_in_dim(bank, to_host(function(to_device(old), *parts)), first, 0)

    return lax.fori_loop(0, jnp.where(wanted, bank.shape[0] // size, 0), step, bank)


def _chunk(bank: jax.Array) -> int:
    """Rows to be on the device at a time: the most that divide all rows and fit."""
    n = bank.shape[0]
    fit = max(1, _CHUNK_BYTES // max(1, math.prod(bank.shape[1:]) * bank.dtype.itemsize))
    return next(size for size in range(min(n, fit), 0, -1) if n % size == 0) if n else 1
