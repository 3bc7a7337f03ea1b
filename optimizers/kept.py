"""What a device keeps of its blocks for their preconditioner: arrays, and how they are read."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import storage
from .linalg.sketch import columns, is_sketch
from .linalg.symmetric import pack, packed_shape, unpack
from .options import ShampooOptions
from .plan.blocks import Bucket
from .preconditioners import PRECONDITIONERS, Preconditioner
from .preconditioners.base import Blocks

NO_GRADIENT = -1000


class Roots(NamedTuple):
    """What a refresh reads and writes for the blocks of one bucket; axis 0 of every array numbers the slots.

    Attributes:
      statistics: per preconditioned side [n, r, r], packed (see the module `symmetric`), or [n, r, rank], a sketch
        (see the module `sketch`), of gradients divided by 2^exponent.
      exponent: [n] int32, of the largest gradient entry so far: squares of gradients would leave float32 far sooner
        than gradients do. NO_GRADIENT before the first that is not zero.
      roots: per preconditioned side [n, r, r], packed where they are symmetric, or [n, r, rank]: what acts on it, an
        inverse root or what else the preconditioner makes of its statistics; zero before the first accepted refresh.
      second_moment: [n, *shape] float32, of the gradients as a preconditioner sees them that adapts; None otherwise.
      residual: [n] float32 of the newest accepted roots, the worst side.
      condition: [n] float32, estimate of the condition number of the regularised statistics, the worst side.
      effective_rank: [n] float32, trace / largest eigenvalue of the statistics, the side where it is least.
      refreshed: [n] int32, the step count after which the roots were accepted; 0 before the first.
      failures: [n] int32, refused refreshes in a row.
      refreshes: [n] int32, accepted refreshes in all.
      spared: per preconditioned side [n] int32, in how many of these its factor stayed, being still suited.
    """

    statistics: tuple[jax.Array, ...]
    exponent: jax.Array
    roots: tuple[jax.Array, ...]
    second_moment: jax.Array | None
    residual: jax.Array
    condition: jax.Array
    effective_rank: jax.Array
    refreshed: jax.Array
    failures: jax.Array
    refreshes: jax.Array
    spared: tuple[jax.Array, ...]


def initial_roots(bucket: Bucket, slots: int, options: ShampooOptions) -> Roots:
    """Before the first gradient."""
    numbers = range(len(bucket.sides))
    return Roots(
        statistics=_nothing(slots, [statistics_shape(bucket, k) for k in numbers], options.statistics_dtype),
        exponent=jnp.full(slots, NO_GRADIENT, jnp.int32),
        roots=_nothing(slots, [factor_shape(bucket, k) for k in numbers], options.roots_dtype),
        second_moment=jnp.zeros((slots, *bucket.shape), jnp.float32) if preconditioner_of(bucket).adapts else None,
        residual=jnp.zeros(slots, jnp.float32),
        condition=jnp.zeros(slots, jnp.float32),
        effective_rank=jnp.zeros(slots, jnp.float32),
        refreshed=jnp.zeros(slots, jnp.int32),
        failures=jnp.zeros(slots, jnp.int32),
        refreshes=jnp.zeros(slots, jnp.int32),
        spared=tuple(jnp.zeros(slots, jnp.int32) for _ in numbers),
    )


def _nothing(slots: int, shapes: Sequence[tuple[int, int]], dtype: str) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros((slots, *storage.shape_of(shape, dtype)), dtype) for shape in shapes)


def preconditioner_of(bucket: Bucket) -> Preconditioner:
    """The member of the family that a bucket's blocks are under."""
    return PRECONDITIONERS[bucket.group.preconditioner]


def statistics_shape(bucket: Bucket, number: int) -> tuple[int, int]:
    """Of what is kept of the statistics of the k-th preconditioned side: packed, or a sketch."""
    return kept_shape(bucket.shape[bucket.sides[number]], bucket.group.rank)


def factor_shape(bucket: Bucket, number: int) -> tuple[int, int]:
    """Of what is kept for the k-th preconditioned side to act on it."""
    r = bucket.shape[bucket.sides[number]]
    return kept_shape(r, bucket.group.rank, symmetric=preconditioner_of(bucket).symmetric)


def kept_shape(r: int, rank: int, *, symmetric: bool = True) -> tuple[int, int]:
    """Of what is kept of a matrix r x r: half of it where it is symmetric; with a rank, perhaps a sketch."""
    if columns(r, rank) < r:
        return r, rank
    return packed_shape(r) if symmetric else (r, r)


def kept_factor(x: Any, bucket: Bucket) -> Any:
    """A factor [..., r, r], or [..., r, rank], as it is kept; NumPy or JAX."""
    return pack(x) if preconditioner_of(bucket).symmetric and not is_sketch(x) else x


def factors(kept: Sequence[jax.Array], bucket: Bucket) -> list[jax.Array]:
    """Per preconditioned side [n, r, r] float32, or [n, r, rank], of arrays [n, ...] as they are kept."""
    symmetric = preconditioner_of(bucket).symmetric
    loaded = [storage.loaded(x, factor_shape(bucket, number)) for number, x in enumerate(kept)]
    return [whole(x, bucket, number) if symmetric else x for number, x in enumerate(loaded)]


def statistics_of(kept: jax.Array, bucket: Bucket, number: int) -> jax.Array:
    """[n, r, r] float32 of one preconditioned side, or [n, r, rank], from [n, ...] as they are kept."""
    return whole(storage.loaded(kept, statistics_shape(bucket, number)), bucket, number)


def whole(x: Any, bucket: Bucket, number: int) -> Any:
    """Packed matrices of the k-th preconditioned side [..., r, r]; a sketch as it is. NumPy or JAX."""
    r = bucket.shape[bucket.sides[number]]
    return x if columns(r, bucket.group.rank) < r else unpack(x, r)


def trace(statistics: Any) -> Any:
    """[...] of statistics [..., r, r], or [..., r, rank] of a sketch, whose last column is the diagonal."""
    if is_sketch(statistics):
        return statistics[..., -1].sum(axis=-1)
    xp: Any = jnp if isinstance(statistics, jax.Array) else np
    return xp.trace(statistics, axis1=-2, axis2=-1)


def grafted(bucket: Bucket, options: ShampooOptions) -> bool:
    """Whether the update of a bucket's blocks has the length of the graft's."""
    return options.graft != "none" and preconditioner_of(bucket).grafts


def blocks_of(roots: Roots, bucket: Bucket, sizes: jax.Array) -> Blocks:
    """A device's blocks as a preconditioner sees them; `sizes` are [n, sides of a block] their real lengths."""
    return Blocks(
        sides=bucket.sides,
        factors=factors(roots.roots, bucket),
        found=roots.refreshed > 0,
        exponent=roots.exponent,
        statistics=lambda: [statistics_of(kept, bucket, number) for number, kept in enumerate(roots.statistics)],
        second_moment=roots.second_moment,
        sizes=sizes,
        group=bucket.group,
    )


def usable(roots: Roots, bucket: Bucket, options: ShampooOptions, step: jax.Array) -> jax.Array:
    """[n] whether a block acts by its preconditioner on a step, rather than by the graft method."""
    always = jnp.ones_like(roots.refreshed, dtype=bool)
    if not preconditioner_of(bucket).grafts:
        return always
    sound = (roots.refreshed > 0) & (roots.failures < options.max_failures) if bucket.sides else always
    return sound & (step >= options.start_step)


def rows(roots: Roots, slot: jax.Array) -> list[jax.Array]:
    """The factors of some slots, as they are kept."""
    return [x.at[slot].get(mode="clip") for x in roots.roots]
