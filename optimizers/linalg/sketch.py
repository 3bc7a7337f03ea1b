"""Statistics of long sides in less memory: what they make of a few fixed directions, and inverse roots of that.

Of a side's statistics S [r, r] a sketch of rank k keeps S W, for k - 1 columns W of signs that depend on nothing but
their place, and the diagonal of S. It is linear in S, so it decays and adds up as statistics do, by matrix products
alone, on every step; an eigenvalue problem of order k is solved where a factor is due, on the owner's device or on the
host. (Frequent Directions, which Sketchy uses for the same purpose, arXiv 2302.03764, decompose at each update.)

From the sketch comes S W (W' S W)^+ W' S = U diag(w) U', the one-pass approximation of Nystroem, which is never above S
(Tropp, Yurtsever, Udell and Cevher, arXiv 1706.05736). What it has not seen of the trace counts as equal in all other
directions: with rho = (trace S - sum w) / (r - k + 1) and the ridge, the factor is

    c I - U diag(c - (w + floor)^(-1/p)) U',   floor = rho + ridge max(w),   c = floor^(-1/p)

It is kept as the k - 1 columns of U diag(c - (w + floor)^(-1/p)), and a column whose entries are c.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import lapack, newton
from .roots import RootResult

_NOTHING = 1e-20  # squared length of a column, in units of c, that changes no digit
_MULTIPLIERS = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))  # of the finaliser of MurmurHash3 (public domain)


def columns(r: int, rank: int) -> int:
    """Of what is kept of the statistics of a side of length r: r, all of them, unless a sketch is less than half."""
    return rank if 0 < 2 * rank < r else r


def is_sketch(x: Any) -> bool:
    """Whether statistics, or a factor of them, are those of a sketch, which has fewer columns than rows."""
    return x.shape[-1] != x.shape[-2]


def directions(r: int, number: int, xp: Any = jnp) -> Any:
    """W [r, number] float32 of signs; its first rows are those of any longer one. `xp` is NumPy or JAX."""
    row, column = (xp.arange(n, dtype=xp.uint32) for n in (r, number))
    bits = row[:, None] * xp.uint32(0x9E3779B1) + column[None, :] * xp.uint32(0x85EBCA77) + xp.uint32(1)
    for shift, factor in _MULTIPLIERS:
        bits = (bits ^ (bits >> xp.uint32(shift))) * xp.uint32(factor)
    bits = bits ^ (bits >> xp.uint32(16))
    return xp.where(bits >> xp.uint32(31) == 1, xp.float32(1), xp.float32(-1))


def moments(x: jax.Array, side: int, rank: int) -> jax.Array:
    """[n, r, rank] the sketch of X X' for blocks x [n, *s], X unfolded along a side of length r."""
    others = [axis for axis in range(1, x.ndim) if axis != side + 1]
    highest = jax.lax.Precision.HIGHEST
    seen = jax.lax.dot_general(x, directions(x.shape[side + 1], rank - 1), (((side + 1,), (0,)), ((), ())), highest)
    product = jax.lax.dot_general(x, seen, ((others, list(range(1, x.ndim - 1))), ((0,), (0,))), highest)
    return jnp.concatenate([product, jnp.sum(x * x, axis=others)[..., None]], axis=-1)


def of(a: np.ndarray, rank: int) -> np.ndarray:
    """[..., r, rank] the sketch of whole statistics [..., r, r]."""
    seen = a @ directions(a.shape[-1], rank - 1, np)
    return np.concatenate([seen, np.diagonal(a, axis1=-2, axis2=-1)[..., None]], axis=-1)


def inverse_root(sketch_nrk: jax.Array, p: int, ridge: float, sizes_n: jax.Array) -> RootResult:
    """The factors of a stack of sketches [n, r, k], on a device; zero in the padding.

    The residual is |U diag(w) U' W - S W| / |S W| in Frobenius' norm: what is kept of S acts on W as S does.
    """
    finite = jnp.all(jnp.isfinite(sketch_nrk), axis=(-2, -1))
    sketch = jnp.where(finite[:, None, None], sketch_nrk, 0)
    trace = jnp.sum(sketch[..., -1], axis=-1)
    nonzero = trace > 0
    unit = jnp.where(nonzero, trace, 1)
    result = _solve(sketch / unit[:, None, None], p, ridge, sizes_n[:, None].astype(jnp.float32), jnp)
    return RootResult(
        root=jnp.where(nonzero[:, None, None], result.root * (unit ** (-1 / p))[:, None, None], 0),
        residual=jnp.where(finite, jnp.where(nonzero, result.residual, 1), jnp.nan),
        largest=jnp.where(nonzero, result.largest * unit, 0),
        condition=jnp.where(nonzero, result.condition, 1),
        effective_rank=jnp.where(nonzero, result.effective_rank, 0),
    )


def inverse_root_on_host(a: np.ndarray, size: int, p: int, ridge: float) -> lapack.HostRoot:
    """The same of one sketch [r, k] float64 with `size` real rows; the factor [r, k].

    Raises:
      numpy.linalg.LinAlgError: LAPACK did not converge.
    """
    trace = float(np.sum(a[:, -1]))
    if trace <= 0:
        return lapack.HostRoot(np.zeros_like(a), 1.0, 0.0, 1.0, 0.0)
    found = _solve((a / trace)[None], p, ridge, np.full((1, 1), float(size)), np)
    residual, largest, condition, rank = (float(x[0]) for x in found[1:])
    return lapack.HostRoot(found.root[0] * trace ** (-1 / p), residual, largest * trace, condition, rank)


def multiplied(x: jax.Array, factor: jax.Array, side: int) -> jax.Array:
    """Blocks [n, *s] with a side multiplied by its factor [n, r, k]."""
    c = factor[:, 0, -1]
    # In units of c: of gradients of any size the squares are within float32.
    kept = factor[..., :-1] / jnp.where(c > 0, c, 1)[:, None, None]
    squares = jnp.sum(kept * kept, axis=-2)
    # Rounded to fewer bits, a column might be longer than c, and its direction would be turned round.
    share = jnp.where(squares > _NOTHING, jnp.minimum(jnp.sqrt(squares), 1) / jnp.maximum(squares, _NOTHING), 0)
    highest = jax.lax.Precision.HIGHEST
    seen = jax.lax.dot_general(kept, x, (((1,), (side + 1,)), ((0,), (0,))), highest)
    seen = seen * share.reshape(*share.shape, *[1] * (x.ndim - 2))
    gone = jax.lax.dot_general(kept, seen, (((2,), (1,)), ((0,), (0,))), highest)
    return c.reshape(-1, *[1] * (x.ndim - 1)) * (x - jnp.moveaxis(gone, 1, side + 1))


def _solve(a: Any, p: int, ridge: float, sizes: Any, xp: Any) -> RootResult:
    """Factors of sketches [n, r, k] of statistics whose trace is 1, in the precision of `xp`, NumPy or JAX."""
    r, number = a.shape[-2], a.shape[-1] - 1
    tiny = float(number * xp.finfo(a.dtype).eps)

    def product(x: Any, y: Any) -> Any:
        return x @ y if xp is np else newton.matmul(x, y)

    def transposed(x: Any) -> Any:
        return xp.swapaxes(x, -2, -1)

    def scales(values: Any) -> tuple[Any, Any]:
        """values^(-1/2) where they are more than rounding, else 0; and which those are."""
        real = values > tiny * xp.max(values, axis=-1, keepdims=True)
        return xp.where(real, xp.where(real, values, 1) ** -0.5, 0), real

    real = xp.arange(r)[None, :, None] < sizes[:, :, None]
    w = xp.where(real, directions(r, number, xp).astype(a.dtype), 0)
    seen = xp.where(real, a[..., :-1], 0)
    core = product(transposed(w), seen)
    values, vectors = xp.linalg.eigh((core + transposed(core)) / 2)
    b = product(seen, vectors * scales(values)[0][:, None, :])  # b b' is what is kept of the statistics
    gram = product(transposed(b), b)
    values, vectors = xp.linalg.eigh((gram + transposed(gram)) / 2)
    scale, kept = scales(values)
    values = xp.where(kept, values, 0)
    u = product(b, vectors * scale[:, None, :])
    total, largest = xp.sum(values, axis=-1), xp.max(values, axis=-1)
    rest = xp.maximum(1 - total, 0) / xp.maximum(sizes[:, 0] - number, 1)
    floor = rest + ridge * largest
    floor = xp.where(floor > 0, floor, 1)  # without a ridge, of statistics that the sketch holds whole: refused below
    c = floor ** (-1 / p)
    gone = xp.where(kept, c[:, None] - (values + floor[:, None]) ** (-1 / p), 0)
    again = product(u * values[:, None, :], product(transposed(u), w)) - seen
    residual = xp.sqrt(xp.sum(again * again, axis=(-2, -1)) / xp.sum(seen * seen, axis=(-2, -1)))
    whole = (rest == 0) & (ridge == 0)
    root = xp.concatenate([u * gone[:, None, :], xp.where(real, c[:, None, None], 0)], axis=-1)
    return RootResult(
        root=root,
        residual=xp.where(whole, xp.maximum(residual, 1), residual),
        largest=largest,
        condition=(largest + floor) / floor,
        effective_rank=1 / xp.where(largest > 0, largest, 1),
    )
