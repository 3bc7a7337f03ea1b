"""Symmetric matrices in half the memory: a matrix and its transpose say everything twice.

The rectangular full packed format of LAPACK (Gustavson et al., ACM TOMS 37(2), 2010, article 18): with r = 2 h, the
lower left quarter as it is, and above it the lower triangle of the upper left quarter and the upper triangle of the
lower right one, which together fill [h + 1, h]. Nothing but slices and selections, so that no accelerator gathers. An
odd side is made even by a row and a column of zeros.

TPUs keep rows of 128 numbers, and half-filled ones where there are fewer: a matrix from 64 x 64 on whose half is no
multiple of 128 is therefore laid out in rows of 128, the last one filled up with zeros.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LANES = 128
_LEAST = 64


def packed_shape(r: int) -> tuple[int, int]:
    """Of a packed matrix r x r."""
    half = (r + 1) // 2
    rows = 2 * half + 1
    return (rows, half) if r < _LEAST or half % _LANES == 0 else (math.ceil(rows * half / _LANES), _LANES)


def pack(x: Any) -> Any:
    """[..., r, r] symmetric, of which the lower triangle counts, to [..., *packed_shape(r)]; NumPy or JAX."""
    shape = packed_shape(x.shape[-1])
    xp, x = _even(x)
    half = x.shape[-1] // 2
    above, corner, below = x[..., :half, :half], x[..., half:, :half], x[..., half:, half:]
    row, column = np.arange(half + 1)[:, None], np.arange(half)
    none = [(0, 0)] * (x.ndim - 2)
    upper = xp.pad(xp.swapaxes(below, -2, -1), [*none, (0, 1), (0, 0)])
    lower = xp.pad(above, [*none, (1, 0), (0, 0)])
    packed = xp.concatenate([xp.where(row > column, lower, upper), corner], axis=-2)
    if packed.shape[-2:] == shape:
        return packed
    flat = packed.reshape(*packed.shape[:-2], -1)
    return xp.pad(flat, [*none, (0, math.prod(shape) - flat.shape[-1])]).reshape(*flat.shape[:-1], *shape)


def unpack(x: Any, r: int) -> Any:
    """[..., *packed_shape(r)] to [..., r, r]; NumPy or JAX."""
    xp: Any = jnp if isinstance(x, jax.Array) else np
    half = (r + 1) // 2
    if x.shape[-2:] != (2 * half + 1, half):
        flat = x.reshape(*x.shape[:-2], -1)[..., : (2 * half + 1) * half]
        x = flat.reshape(*x.shape[:-2], 2 * half + 1, half)
    both, corner = x[..., : half + 1, :], x[..., half + 1 :, :]
    above = _mirrored(both[..., 1:, :], xp)
    below = _mirrored(xp.swapaxes(both[..., :half, :], -2, -1), xp)
    top = xp.concatenate([above, xp.swapaxes(corner, -2, -1)], axis=-1)
    whole = xp.concatenate([top, xp.concatenate([corner, below], axis=-1)], axis=-2)
    return whole[..., :r, :r]


def _mirrored(x: Any, xp: Any) -> Any:
    """The symmetric matrix of a lower triangle."""
    row, column = np.arange(x.shape[-1])[:, None], np.arange(x.shape[-1])
    return xp.where(row >= column, x, xp.swapaxes(x, -2, -1))


def _even(x: Any) -> tuple[Any, Any]:
    xp: Any = jnp if isinstance(x, jax.Array) else np
    return xp, xp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, x.shape[-1] % 2)] * 2)
