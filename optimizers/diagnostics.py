"""Diagnostics of the optimizer, computed from its state."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .options import Options
from .plan.blocks import Bucket
from .preconditioners.base import NO_GRADIENT

_MOST_LAYERS = 128  # rows of one parameter


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
        rooted, acting, fallback = _use(roots, options)

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
            f"{name}/fallbacks": jnp.sum(fallback),
        }
    return result


def by_block(state: Any, options: Options) -> dict[str, jax.Array]:
    """Return bucket -> float32 [metrics, slots], the metrics of `by_layer` of the block in each slot.

    A metric is NaN for a block that has none, such as the condition of a block without roots.
    """
    result = {}
    for name, bucket in state.buckets.items():
        roots = bucket.roots
        if roots.statistics:
            rooted, acting, fallback = _use(roots, options)
            known = (
                jnp.where(rooted, roots.condition, jnp.nan),
                jnp.where(rooted, roots.effective_rank, jnp.nan),
                jnp.where(rooted, state.count - roots.refreshed, jnp.nan),
                jnp.where(acting, bucket.graft_ratio, jnp.nan),
                fallback,
            )
            result[name] = jnp.stack([x.astype(jnp.float32) for x in known])
    return result


def by_layer(buckets: tuple[Bucket, ...], found: Mapping[str, np.ndarray]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Gather what `by_block` has returned into layers.

    A layer is a parameter, or one entry of its first stacked axis, if this has at most 128.

    Returns:
      Names of the layers, in the order of the parameters, and metric -> [layers], NaN where no block has it:
      `condition`, the largest of the blocks; `effective_rank`, `staleness` and `graft_ratio`, their means; `fallbacks`,
      the number of blocks that use the graft method.
    """
    rows: list[tuple[int, str, np.ndarray]] = []
    for bucket in buckets:
        if bucket.name not in found:
            continue
        first, of_slot = 0, bucket.matrix_of_slot
        for leaf in bucket.leaves:
            view = leaf.view
            count = view.shape[view.stack[0]] if view.stack else 1
            count = count if count <= _MOST_LAYERS else 1
            layer = (of_slot - first) // (view.stacked // count)
            for number in range(count):
                name = f"{leaf.path} {number}" if count > 1 else leaf.path
                rows.append((leaf.index, name, found[bucket.name][:, (of_slot >= first) & (layer == number)]))
            first += view.stacked
    rows.sort(key=lambda row: row[0])
    table = np.array([_merged(values) for _, _, values in rows]).reshape(-1, 5).T
    metrics = "condition", "effective_rank", "staleness", "graft_ratio", "fallbacks"
    return [name for _, name, _ in rows], dict(zip(metrics, table, strict=True))


def _merged(values: np.ndarray) -> list[float]:
    known = [row[np.isfinite(row)] for row in values]
    means = [float(row.mean()) if len(row) else np.nan for row in known[1:4]]
    return [float(known[0].max(initial=-np.inf)) if len(known[0]) else np.nan, *means, float(known[4].sum())]


def _use(roots: Any, options: Options) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return [n] bool: whether a block has roots, acts by them, and uses the graft method though it has a gradient."""
    rooted = roots.refreshed > 0
    acting = rooted & (roots.failures < options.max_failures)
    return rooted, acting, (roots.scale_log2 > NO_GRADIENT) & ~acting
