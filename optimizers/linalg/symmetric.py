"""Store symmetric matrices in half the memory.

The format is LAPACK's rectangular full packed format (Gustavson et al., ACM TOMS 37(2), 2010, article 18). With
r = 2 h, the lower left quarter is stored unchanged. Above it, the lower triangle of the upper left quarter and the
upper triangle of the lower right quarter fill [h + 1, h]. An odd side is padded by a row and a column of zeros. Packing
needs only slices and selections, no gathers.

TPUs store rows in multiples of 128 numbers. Matrices from 64 x 64 whose half is not a multiple of 128 are therefore
stored in rows of 128, the last one padded with zeros.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LANES = 128
_LEAST = 64


def packed_shape(r: int) -> tuple[int, int]:
    """Return the shape of a packed matrix r x r."""
    half = (r + 1) // 2
    rows = 2 * half + 1
    return (rows, half) if r < _LEAST or half % _LANES == 0 else (math.ceil(rows * half / _LANES), _LANES)


def pack(x: Any) -> Any:
    """Pack symmetric matrices [..., r, r], reading the lower triangle, to [..., *packed_shape(r)]; NumPy or JAX."""
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
    """Unpack [..., *packed_shape(r)] to [..., r, r]; NumPy or JAX."""
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
    """Return the symmetric matrix with the lower triangle of x."""
    row, column = np.arange(x.shape[-1])[:, None], np.arange(x.shape[-1])
    return xp.where(row >= column, x, xp.swapaxes(x, -2, -1))


def _even(x: Any) -> tuple[Any, Any]:
    xp: Any = jnp if isinstance(x, jax.Array) else np
    return xp, xp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, x.shape[-1] % 2)] * 2)
