"""Diagnostics of the optimizer, computed from its state."""

from typing import Any

import jax
import jax.numpy as jnp

from .options import Options
from .preconditioners.base import NO_GRADIENT


def diagnose(state: Any, options: Options) -> dict[str, jax.Array]:
    """Return scalars of a `state.ShampooState` by name.

    `refreshes` is the number of accepted refreshes of all blocks, `skipped` that of skipped steps. For each bucket,
    `<bucket>/...`:

    residual, condition: maximum over blocks with roots.
    effective_rank: mean over blocks with roots of trace / largest eigenvalue, for the side with the smaller value.
    staleness: mean number of steps since the last accepted refresh.
    graft_ratio: mean factor from the preconditioned direction to the graft's norm.
    failures: sum over blocks of rejected refreshes in a row.
    fallbacks: number of blocks that have seen a gradient but use the graft method, without roots or after failures.
    """
    result = {"refreshes": jnp.zeros((), jnp.int32), "skipped": state.skipped}
    for name, bucket in state.buckets.items():
        roots = bucket.roots
        if not roots.statistics:
            continue
        rooted = roots.refreshed > 0
        acting = rooted & (roots.failures < options.max_failures)
        seen = roots.scale_log2 > NO_GRADIENT

        def mean(x: jax.Array, of: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(of, x, 0)) / jnp.maximum(jnp.sum(of), 1)

        result["refreshes"] += jnp.sum(roots.refreshes)
        result |= {
            f"{name}/residual": jnp.max(jnp.where(rooted, roots.residual, 0)),
            f"{name}/condition": jnp.max(jnp.where(rooted, roots.condition, 0)),
            f"{name}/effective_rank": mean(roots.effective_rank, rooted),
            f"{name}/staleness": mean(state.count - roots.refreshed, rooted),
            f"{name}/graft_ratio": mean(bucket.graft_ratio, acting),
            f"{name}/failures": jnp.sum(roots.failures),
            f"{name}/fallbacks": jnp.sum(seen & ~acting),
        }
    return result
