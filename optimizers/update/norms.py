"""The length of an update: the graft's norm, and the bound on its root mean square, per matrix or per block."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..exchange import Owners
from ..kept import grafted
from ..options import Options
from ..plan.blocks import Bucket


class Squares(NamedTuple):
    """Sums of squares over each block [slots], one array per bucket.

    Attributes:
      own: of the preconditioned direction, 0 for blocks that act by the graft method.
      wanted: of the graft's direction, 0 for blocks that act by the graft method.
      rest: of the graft's direction on blocks that act by the graft method, 0 for the others.
    """

    own: jax.Array
    wanted: jax.Array
    rest: jax.Array


def over_matrices(
    values: dict[str, jax.Array], matrix_of_slot: dict[str, jax.Array], buckets: Sequence[Bucket], owners: Owners
) -> dict[str, jax.Array]:
    """Sums of values [k, slots] over the blocks of each matrix, again [k, slots]; one sum over the devices."""
    sums = []
    for bucket in buckets:
        of_matrix = matrix_of_slot[bucket.name][:, None] == jnp.arange(bucket.matrices)
        sums.append(jnp.sum(jnp.where(of_matrix, values[bucket.name][:, :, None], 0), axis=1))
    if not sums:
        return {}
    joined, result, first = owners.sum(jnp.concatenate(sums, axis=1)), {}, 0
    for bucket in buckets:
        result[bucket.name] = joined[:, first : first + bucket.matrices][:, matrix_of_slot[bucket.name]]
        first += bucket.matrices
    return result


def factors(
    squares: dict[str, Squares],
    elements: dict[str, jax.Array],
    matrix_of_slot: dict[str, jax.Array],
    buckets: Sequence[Bucket],
    owners: Owners,
    options: Options,
    exponent: jax.Array | int,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """What each block's direction is to be multiplied by: (with its roots, by the graft method), each [slots].

    Blocks with roots take the norm that the graft's direction has on them. Blocks without take no part in that norm,
    for they have the graft's direction itself; they do in the root mean square that `clip_rms` bounds.

    Args:
      squares: bucket name -> sums over each block.
      elements: bucket name -> [slots], elements of each block or, for norms over matrices, of its matrix.
      matrix_of_slot: bucket name -> [slots], numbers of matrices.
      buckets: the buckets.
      owners: who holds the slots.
      options: graft, graft_norm and clip_rms.
      exponent: `wanted` and `rest` are of directions divided by 2^exponent.
    """
    totals = {name: jnp.stack(sums) for name, sums in squares.items()}
    if options.graft_norm == "parameter" and (options.graft != "none" or options.clip_rms):
        totals = over_matrices(totals, matrix_of_slot, buckets, owners)
    rooted, graft = {}, {}
    for bucket in buckets:
        own, wanted, rest = totals[bucket.name]
        if not grafted(bucket, options):
            ratio, wanted = jnp.ones_like(own), own
        else:
            ratio = jnp.where(own > 0, jnp.sqrt(wanted / jnp.where(own > 0, own, 1)), 0)
        clip = jnp.ones_like(own)
        if options.clip_rms:
            rms = jnp.sqrt((jnp.where(own > 0, wanted, 0) + rest) / elements[bucket.name])
            limit = options.clip_rms * jnp.exp2(-jnp.float32(exponent))
            clip = limit / jnp.maximum(rms, limit)
        rooted[bucket.name], graft[bucket.name] = ratio * clip, clip
    return rooted, graft
