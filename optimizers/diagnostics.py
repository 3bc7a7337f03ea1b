"""Numbers that tell how the optimizer fares, from what its state holds."""

import math

import jax
import jax.numpy as jnp

from . import storage
from .kept import NO_GRADIENT
from .options import ShampooOptions
from .state import ShampooState


def diagnose(state: ShampooState, options: ShampooOptions) -> dict[str, jax.Array]:
    """Scalars about the state: refreshes in all, and the share of their work that factors spared which the tolerance

    let stay (one of r rows counts r^3); and for every bucket, over its blocks with roots,
    residual and condition (the largest), effective_rank (the mean of trace / largest eigenvalue of the smaller
    side), staleness (mean steps since the roots' refresh), graft_ratio (the mean); failures (refused refreshes in
    a row, summed) and fallbacks: blocks that have seen a gradient and act by the graft method, because they have no
    roots yet or their refreshes keep failing. Where they are not kept as float32, also statistics_rounding and
    roots_rounding: the error expected of storing them, relative, of the worse side, the mean over blocks.
    """
    result = {"refreshes": jnp.zeros((), jnp.int32), "spared": jnp.zeros((), jnp.float32)}
    work = jnp.zeros((), jnp.float32)
    for name, bucket in state.buckets.items():
        roots = bucket.roots
        if not roots.statistics:
            continue
        rooted = roots.refreshed > 0
        acting = rooted & (roots.failures < options.max_failures)
        number = jnp.maximum(jnp.sum(rooted), 1)
        seen = roots.exponent > NO_GRADIENT
        result["refreshes"] += jnp.sum(roots.refreshes)
        for packed, spared in zip(roots.statistics, roots.spared, strict=True):
            solve = float(math.prod(packed.shape[1:])) ** 1.5
            result["spared"] += solve * jnp.sum(spared)
            work += solve * jnp.sum(roots.refreshes)
        result |= {
            f"{name}/residual": jnp.max(jnp.where(rooted, roots.residual, 0)),
            f"{name}/condition": jnp.max(jnp.where(rooted, roots.condition, 0)),
            f"{name}/effective_rank": jnp.sum(jnp.where(rooted, roots.effective_rank, 0)) / number,
            f"{name}/staleness": jnp.sum(jnp.where(rooted, state.count - roots.refreshed, 0)) / number,
            f"{name}/graft_ratio": jnp.sum(jnp.where(acting, bucket.graft_ratio, 0)) / jnp.maximum(jnp.sum(acting), 1),
            f"{name}/failures": jnp.sum(roots.failures),
            f"{name}/fallbacks": jnp.sum(seen & ~acting),
        }
        for what, arrays, dithered in (("statistics", roots.statistics, True), ("roots", roots.roots, False)):
            if arrays[0].dtype != jnp.float32:
                worst = jnp.stack([storage.rounding(x, dithered=dithered) for x in arrays]).max(axis=0)
                result[f"{name}/{what}_rounding"] = jnp.sum(jnp.where(rooted, worst, 0)) / number
    return result | {"spared": result["spared"] / jnp.maximum(work, 1)}
