"""Scale preconditioned directions to the norm of the graft method's, over each matrix of a stack."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .exchange import Owners
from .plan.blocks import Bucket


def over_matrices(
    values: dict[str, jax.Array], matrix_of_slot: dict[str, jax.Array], buckets: Sequence[Bucket], owners: Owners
) -> dict[str, jax.Array]:
    """Return sums of values [slots, k] over the blocks of each matrix, [slots, k], by one all-reduce."""
    if not buckets:
        return {}
    sums = [jax.ops.segment_sum(values[b.name], matrix_of_slot[b.name], b.matrices) for b in buckets]
    joined, result, first = owners.sum(jnp.concatenate(sums)), {}, 0
    for bucket in buckets:
        result[bucket.name] = joined[first : first + bucket.matrices][matrix_of_slot[bucket.name]]
        first += bucket.matrices
    return result


def ratios(
    squares: dict[str, jax.Array],
    matrix_of_slot: dict[str, jax.Array],
    buckets: Sequence[Bucket],
    owners: Owners,
) -> dict[str, jax.Array]:
    """Return the ratio of the graft's norm to that of the preconditioned direction, [slots], over each matrix.

    Norms are taken over the blocks with roots: a block without roots has the graft's own direction.

    Args:
      squares: bucket name -> [slots, 2], sums of squares of the preconditioned direction and of the graft's; 0 for
        blocks without roots.
      matrix_of_slot: bucket name -> [slots], matrix of each block.
      buckets: buckets whose directions are grafted.
      owners: owners of the slots.
    """
    sums = over_matrices(squares, matrix_of_slot, buckets, owners)
    return {
        name: jnp.where(x[:, 0] > 0, jnp.sqrt(x[:, 1] / jnp.where(x[:, 0] > 0, x[:, 0], 1)), 0)
        for name, x in sums.items()
    }
