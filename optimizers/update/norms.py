"""Scale updates to the graft's norm and clip their root mean square, per matrix or per block."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..exchange import Owners
from ..linalg.scaling import power_of_two
from ..options import Options
from ..plan.blocks import Bucket


class Squares(NamedTuple):
    """Sums of squares over each block of a bucket, [slots].

    Attributes:
      own: sums for the preconditioned direction; 0 for blocks that use the graft method.
      wanted: sums for the graft's direction; 0 for blocks that use the graft method.
      rest: sums for the graft's direction of blocks that use the graft method; 0 for other blocks.
    """

    own: jax.Array
    wanted: jax.Array
    rest: jax.Array


def grafted(bucket: Bucket, options: Options) -> bool:
    """Return whether the updates of a bucket get the graft's norm."""
    return options.graft != "none" and bucket.preconditioner.grafts


def over_matrices(
    values: dict[str, jax.Array], matrix_of_slot: dict[str, jax.Array], buckets: Sequence[Bucket], owners: Owners
) -> dict[str, jax.Array]:
    """Return sums of values [k, slots] over the blocks of each matrix, [k, slots], by one all-reduce."""
    sums = []
    for bucket in buckets:
        of_matrix = (matrix_of_slot[bucket.name][:, None] == jnp.arange(bucket.matrices)).astype(jnp.float32)
        sums.append(jnp.matmul(values[bucket.name], of_matrix, precision=lax.Precision.HIGHEST))
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
    scale_log2: jax.Array | int,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Return (factors of preconditioned directions, factors of the graft's directions), each [slots].

    The graft's norm is taken over blocks with roots only, because blocks without roots already have the graft's
    direction. `clip_rms` takes all blocks into account.

    Args:
      squares: bucket name -> sums of squares over each block.
      elements: bucket name -> [slots], number of elements of each block, or of its matrix for norms over matrices.
      matrix_of_slot: bucket name -> [slots], matrix of each block.
      buckets: buckets of the plan.
      owners: owners of the slots.
      options: options of the optimizer.
      scale_log2: binary scale; `wanted` and `rest` are for directions divided by 2^scale_log2.
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
            limit = options.clip_rms * power_of_two(-jnp.asarray(scale_log2))
            clip = limit / jnp.maximum(rms, limit)
        rooted[bucket.name], graft[bucket.name] = ratio * clip, clip
    return rooted, graft
