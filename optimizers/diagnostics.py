"""Numbers that tell how the optimizer fares, from what its state holds."""

import jax
import jax.numpy as jnp

from .options import ShampooOptions
from .refresh import NO_GRADIENT
from .state import ShampooState


def diagnose(state: ShampooState, options: ShampooOptions) -> dict[str, jax.Array]:
    """Scalars about the state: refreshes in all, and for every bucket, over its blocks with roots,

    residual and condition (the largest), effective_rank (the mean of trace / largest eigenvalue of the smaller
    side), staleness (mean steps since the roots' refresh), graft_ratio (the mean); failures (refused refreshes in
    a row, summed) and fallbacks: blocks that have seen a gradient and act by the graft method, because they have no
    roots yet or their refreshes keep failing.
    """
    result = {"refreshes": jnp.zeros((), jnp.int32)}
    for name, bucket in state.buckets.items():
        roots = bucket.roots
        if not roots.statistics:
            continue
        rooted = roots.refreshed > 0
        acting = rooted & (roots.failures < options.max_failures)
        number = jnp.maximum(jnp.sum(rooted), 1)
        seen = roots.exponent > NO_GRADIENT
        result["refreshes"] += jnp.sum(roots.refreshes)
        result |= {
            f"{name}/residual": jnp.max(jnp.where(rooted, roots.residual, 0)),
            f"{name}/condition": jnp.max(jnp.where(rooted, roots.condition, 0)),
            f"{name}/effective_rank": jnp.sum(jnp.where(rooted, roots.effective_rank, 0)) / number,
            f"{name}/staleness": jnp.sum(jnp.where(rooted, state.count - roots.refreshed, 0)) / number,
            f"{name}/graft_ratio": jnp.sum(jnp.where(acting, bucket.graft_ratio, 0)) / jnp.maximum(jnp.sum(acting), 1),
            f"{name}/failures": jnp.sum(roots.failures),
            f"{name}/fallbacks": jnp.sum(seen & ~acting),
        }
    return result
