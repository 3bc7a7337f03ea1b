"""The length of an update: the graft's norm, and the bound on its root mean square, per matrix or per block."""

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
    """Sums of squares over each block [slots], one array per bucket.

    Attributes:
      own: of the preconditioned direction, 0 for blocks that act by the graft method.
      wanted: of the graft's direction, 0 for blocks that act by the graft method.
      rest: of the graft's direction on blocks that act by the graft method, 0 for the others.
    """

    own: jax.Array
    wanted: jax.Array
    rest: jax.Array


def grafted(bucket: Bucket, options: Options) -> bool:
    """Whether the updates of a bucket's blocks get the graft's norm."""
    return options.graft != "none" and bucket.preconditioner.grafts


def over_matrices(
    values: dict[str, jax.Array], matrix_of_slot: dict[str, jax.Array], buckets: Sequence[Bucket], owners: Owners
) -> dict[str, jax.Array]:
    """Sums of values [k, slots] over the blocks of each matrix, again [k, slots]; one sum over the devices."""
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
    """Return the factors of each block's direction: (with its roots, by the graft method), each [slots].

    Blocks with roots take the norm that the graft's direction has on them. Blocks without roots already have the
    graft's direction, so they are left out of that norm; `clip_rms` counts them.

    Args:
      squares: bucket name -> sums over each block.
      elements: bucket name -> [slots], elements of each block or, for norms over matrices, of its matrix.
      matrix_of_slot: bucket name -> [slots], numbers of matrices.
      buckets: the buckets.
      owners: who holds the slots.
      options: graft, graft_norm and clip_rms.
      scale_log2: `wanted` and `rest` are of directions divided by 2^scale_log2.
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
