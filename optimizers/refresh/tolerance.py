"""Which factors that are due still suit their statistics, so that solving anew would bring little."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ..kept import Roots, factors, grafted, preconditioner_of, rows
from ..options import ShampooOptions
from ..plan.blocks import Bucket


def suited(
    roots: Roots,
    slot: jax.Array,
    statistics: Sequence[jax.Array],
    sizes: jax.Array,
    bucket: Bucket,
    options: ShampooOptions,
) -> jax.Array:
    """Which factors of some blocks may stay as they are.

    Args:
      roots: a device's blocks.
      slot: [m] int32, which of them; past the last for none, of which the answer means nothing.
      statistics: per preconditioned side [m, r, r] float32, bias-corrected, of gradients divided by 2^exponent.
      sizes: [m, sides of a block] int32, real lengths.
      bucket: the blocks'.
      options: the tolerance; 0 says of none that it is.

    Returns:
      [m] int32, bit k tells it of the k-th preconditioned side.
    """
    result = jnp.zeros(slot.shape, jnp.int32)
    if not options.tolerance:
        return result
    preconditioner, group = preconditioner_of(bucket), bucket.group
    found = roots.refreshed.at[slot].get(mode="clip") > 0
    scale = jnp.exp2(-preconditioner.shift(roots.exponent.at[slot].get(mode="clip"), group))[:, None, None]
    for number, factor in enumerate(factors(rows(roots, slot), bucket)):
        misfit = preconditioner.misfit(
            statistics[number],
            factor * scale,
            sizes[:, bucket.sides[number]],
            group,
            scale_free=grafted(bucket, options),
        )
        result |= (found & (misfit <= options.tolerance)).astype(jnp.int32) << number
    return result
