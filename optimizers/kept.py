"""The arrays that a device keeps for the preconditioner of its blocks, and how they are read."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .linalg.symmetric import packed_shape, unpack
from .options import Options
from .plan.blocks import Bucket
from .preconditioners import PRECONDITIONERS, Preconditioner
from .preconditioners.base import Blocks

NO_GRADIENT = -1000


class Roots(NamedTuple):
    """State that refreshes read and write, for the blocks of one bucket; axis 0 of every array numbers the slots.

    Attributes:
      statistics: per preconditioned side [n, r, r] float32, packed (`linalg.symmetric`), of gradients divided by
        2^exponent.
      exponent: [n] int32, of the largest gradient entry so far. Squares of gradients would overflow float32 far sooner
        than gradients. NO_GRADIENT before the first gradient that is not zero.
      roots: per preconditioned side [n, r, r], the factor that acts on it: an inverse root or a basis. Zero before the
        first accepted refresh.
      second_moment: [n, *shape] float32, of the gradients in the preconditioner's basis; None if it keeps none.
      residual: [n] float32 of the newest accepted roots, the worst side.
      condition: [n] float32, estimated condition number of the regularised statistics, the worst side.
      effective_rank: [n] float32, trace / largest eigenvalue of the statistics, the side with the smallest value.
      refreshed: [n] int32, step count after which the roots were accepted; 0 before the first.
      failures: [n] int32, refused refreshes in a row.
      refreshes: [n] int32, accepted refreshes in all.
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


def initial_roots(bucket: Bucket, slots: int, options: Options) -> Roots:
    """Return the state before the first gradient."""
    lengths = [bucket.shape[side] for side in bucket.sides]
    return Roots(
        statistics=tuple(jnp.zeros((slots, *packed_shape(r)), jnp.float32) for r in lengths),
        exponent=jnp.full(slots, NO_GRADIENT, jnp.int32),
        roots=tuple(jnp.zeros((slots, r, r), options.roots_dtype) for r in lengths),
        second_moment=jnp.zeros((slots, *bucket.shape), jnp.float32) if preconditioner_of(bucket).adapts else None,
        residual=jnp.zeros(slots, jnp.float32),
        condition=jnp.zeros(slots, jnp.float32),
        effective_rank=jnp.zeros(slots, jnp.float32),
        refreshed=jnp.zeros(slots, jnp.int32),
        failures=jnp.zeros(slots, jnp.int32),
        refreshes=jnp.zeros(slots, jnp.int32),
    )


def preconditioner_of(bucket: Bucket) -> Preconditioner:
    """Return the preconditioner of a bucket's blocks."""
    return PRECONDITIONERS[bucket.group.preconditioner]


def statistics_of(kept: Any, bucket: Bucket, number: int) -> Any:
    """Unpack the statistics of the k-th preconditioned side to [..., r, r]; NumPy or JAX."""
    return unpack(kept, bucket.shape[bucket.sides[number]])


def factors(kept: Sequence[jax.Array]) -> list[jax.Array]:
    """Return roots in float32."""
    return [x.astype(jnp.float32) for x in kept]


def grafted(bucket: Bucket, options: Options) -> bool:
    """Whether the updates of a bucket's blocks get the norm of the graft's."""
    return options.graft != "none" and preconditioner_of(bucket).grafts


def blocks_of(roots: Roots, bucket: Bucket, sizes: jax.Array) -> Blocks:
    """Return a device's blocks for their preconditioner; `sizes` [n, sides of a block] are their real lengths."""
    return Blocks(
        sides=bucket.sides,
        factors=factors(roots.roots),
        found=roots.refreshed > 0,
        exponent=roots.exponent,
        second_moment=roots.second_moment,
        sizes=sizes,
        group=bucket.group,
    )


def usable(roots: Roots, bucket: Bucket, options: Options, step: jax.Array) -> jax.Array:
    """[n] whether a block acts by its preconditioner on a step; otherwise it acts by the graft method."""
    always = jnp.ones_like(roots.refreshed, dtype=bool)
    if not preconditioner_of(bucket).grafts:
        return always
    sound = (roots.refreshed > 0) & (roots.failures < options.max_failures) if bucket.sides else always
    return sound & (step >= options.start_step)


def rows(roots: Roots, slot: jax.Array) -> list[jax.Array]:
    """Return the stored roots of some slots."""
    return [x.at[slot].get(mode="clip") for x in roots.roots]
