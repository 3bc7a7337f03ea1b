"""What a device keeps of its blocks for their preconditioner: arrays, and how they are read."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import storage
from .blocks import Bucket
from .options import ShampooOptions
from .preconditioners import PRECONDITIONERS, Preconditioner
from .preconditioners.base import Blocks
from .symmetric import pack, packed_shape, unpack

NO_GRADIENT = -1000


class Roots(NamedTuple):
    """What a refresh reads and writes for the blocks of one bucket; axis 0 of every array numbers the slots.

    Attributes:
      statistics: per preconditioned side [n, r, r], packed (see the module `symmetric`), of gradients divided by
        2^exponent.
      exponent: [n] int32, of the largest gradient entry so far: squares of gradients would leave float32 far sooner
        than gradients do. NO_GRADIENT before the first that is not zero.
      roots: per preconditioned side [n, r, r], packed where they are symmetric: what acts on it, an inverse root or
        what else the preconditioner makes of its statistics; zero before the first accepted refresh.
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
    lengths = [bucket.shape[side] for side in bucket.sides]
    return Roots(
        statistics=_nothing(slots, [packed_shape(r) for r in lengths], options.statistics_dtype),
        exponent=jnp.full(slots, NO_GRADIENT, jnp.int32),
        roots=_nothing(slots, [factor_shape(bucket, r) for r in lengths], options.roots_dtype),
        second_moment=jnp.zeros((slots, *bucket.shape), jnp.float32) if preconditioner_of(bucket).adapts else None,
        residual=jnp.zeros(slots, jnp.float32),
        condition=jnp.zeros(slots, jnp.float32),
        effective_rank=jnp.zeros(slots, jnp.float32),
        refreshed=jnp.zeros(slots, jnp.int32),
        failures=jnp.zeros(slots, jnp.int32),
        refreshes=jnp.zeros(slots, jnp.int32),
        spared=tuple(jnp.zeros(slots, jnp.int32) for _ in lengths),
    )


def _nothing(slots: int, shapes: Sequence[tuple[int, int]], dtype: str) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros((slots, *storage.shape_of(shape, dtype)), dtype) for shape in shapes)


def preconditioner_of(bucket: Bucket) -> Preconditioner:
    """The member of the family that a bucket's blocks are under."""
    return PRECONDITIONERS[bucket.group.preconditioner]


def factor_shape(bucket: Bucket, r: int) -> tuple[int, int]:
    """Of what is kept for a side of length r to act on it."""
    return packed_shape(r) if preconditioner_of(bucket).symmetric else (r, r)


def kept_factor(x: Any, bucket: Bucket) -> Any:
    """A factor [..., r, r] as it is kept; NumPy or JAX."""
    return pack(x) if preconditioner_of(bucket).symmetric else x


def factors(kept: Sequence[jax.Array], bucket: Bucket) -> list[jax.Array]:
    """Per preconditioned side [n, r, r] float32, of arrays [n, ...] as they are kept."""
    lengths = [bucket.shape[side] for side in bucket.sides]
    whole = [storage.loaded(x, factor_shape(bucket, r)) for r, x in zip(lengths, kept, strict=True)]
    if not preconditioner_of(bucket).symmetric:
        return whole
    return [unpack(x, r) for r, x in zip(lengths, whole, strict=True)]


def statistics_of(kept: jax.Array, bucket: Bucket, number: int) -> jax.Array:
    """[n, r, r] float32 of one preconditioned side, from [n, ...] as they are kept."""
    r = bucket.shape[bucket.sides[number]]
    return unpack(storage.loaded(kept, packed_shape(r)), r)


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
