"""How numbers of the state are kept: as floats, or as bytes that share an exponent, 32 of them.

The bytes are those of the MX formats (Rouhani et al., arXiv 2310.10537; MXINT8 there): of 32 neighbours the largest
decides a power of two, and each is a whole number of at most 127 times it. Both lie in one array of int8, the exponents
behind the numbers, so that a state's arrays stay arrays: 1.03 bytes a number.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

_TOGETHER = 32
_LANES = 128  # what TPUs keep side by side
_BITS = 7


def shape_of(shape: Sequence[int], dtype: Any) -> tuple[int, ...]:
    """Of what keeps a matrix of this shape."""
    if jnp.dtype(dtype) != jnp.int8:
        return tuple(shape)
    numbers, exponents = _rows(shape)
    return numbers + exponents, _LANES


def stored(x: jax.Array, dtype: Any, *, dithered: bool = False) -> jax.Array:
    """[n, rows, columns] float32 as it is kept: [n, *shape_of((rows, columns), dtype)].

    Args:
      x: the numbers.
      dtype: float32, bfloat16 or int8.
      dithered: whether bytes are rounded up or down at random, as often as makes their mean right: an average whose new
        part is less than half a unit would stand still otherwise. The random bits are a hash of the number itself.
    """
    if jnp.dtype(dtype) != jnp.int8:
        return x.astype(dtype)
    numbers, exponents = _rows(x.shape[1:])
    flat = x.reshape(len(x), -1)
    flat = jnp.pad(flat, ((0, 0), (0, numbers * _LANES - flat.shape[1]))).reshape(len(x), -1, _TOGETHER)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(flat), axis=-1, keepdims=True))
    exponent = jnp.clip(exponent, -126 + _BITS, 126)
    scaled = jnp.ldexp(flat, _BITS - exponent)
    whole = jnp.floor(scaled + _dither(scaled)) if dithered else jnp.round(scaled)
    whole = jnp.clip(whole, -127, 127).astype(jnp.int8).reshape(len(x), numbers, _LANES)
    kept = exponent.astype(jnp.int8).reshape(len(x), -1)
    kept = jnp.pad(kept, ((0, 0), (0, exponents * _LANES - kept.shape[1]))).reshape(len(x), exponents, _LANES)
    return jnp.concatenate([whole, kept], axis=1)


def loaded(kept: jax.Array, shape: Sequence[int]) -> jax.Array:
    """[n, ...] as `stored` made it of [n, *shape], float32 again."""
    if kept.dtype != jnp.int8:
        return kept.astype(jnp.float32)
    whole, units = _apart(kept)
    return (whole * units).reshape(len(kept), -1)[:, : math.prod(shape)].reshape(len(kept), *shape)


def rounding(kept: jax.Array, *, dithered: bool = False) -> jax.Array:
    """[n] how large the error of storing is expected to be: root mean square, relative to that of the numbers."""
    if kept.dtype == jnp.int8:
        whole, units = _apart(kept)
        variance = 1 / 6 if dithered else 1 / 12  # of a number that is rounded at random, of one to the nearest
        error = jnp.sum(jnp.where(whole != 0, variance, 0) * units * units, axis=(-2, -1))
        squares = jnp.sum(jnp.square(whole * units), axis=(-2, -1))
    else:
        x = kept.astype(jnp.float32)
        squares = jnp.sum(x * x, axis=tuple(range(1, x.ndim)))
        error = squares * float(jnp.finfo(kept.dtype).eps) ** 2 / 24  # between two powers of two, on average
    return jnp.sqrt(jnp.where(squares > 0, error / jnp.where(squares > 0, squares, 1), 0))


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    numbers = math.ceil(math.prod(shape) / _LANES)
    return numbers, math.ceil(numbers / _TOGETHER)


def _apart(kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(whole numbers [n, groups, 32] float32, what a 1 of each group stands for [n, groups, 1])."""
    n, rows, _ = kept.shape
    numbers = rows - math.ceil(rows / (_TOGETHER + 1))
    whole = kept[:, :numbers].astype(jnp.float32).reshape(n, -1, _TOGETHER)
    exponent = kept[:, numbers:].reshape(n, -1)[:, : whole.shape[1], None].astype(jnp.int32)
    return whole, jnp.ldexp(jnp.float32(1), exponent - _BITS)


def _dither(x: jax.Array) -> jax.Array:
    """Numbers in [0, 1) that look random, of the bits of x: the finaliser of MurmurHash3 (public domain)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)
