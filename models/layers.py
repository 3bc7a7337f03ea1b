"""Small parts that Transformers share: initialisers that name their axes, the norm, what recomputation keeps."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

EMBEDDING_STD = 0.02

# What the forward pass keeps for the backward pass; the rest is computed again.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    # Products with weights are kept, attention's (they have batch dimensions, and grow with T^2) are not.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def axis_names(boxed: Any, variables: Any) -> Any:
    """The names that initialisers have given, a tuple for each array, in a tree shaped like `variables`.

    Args:
      boxed: variables of the same structure in the boxes that `init` returns.
      variables: plain arrays or ShapeDtypeStructs.

    Raises:
      ValueError: the structures differ.
    """
    names = jax.tree.map(
        lambda box: tuple(box.names), boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )
    return jax.tree.map(lambda _, axes: axes, variables, names)


def partitioned(initializer: nn.initializers.Initializer, *names: str) -> nn.initializers.Initializer:
    """The initialiser, which names the axes of what it makes."""
    return nn.with_logical_partitioning(initializer, names)


def fan_in(scale: float, *names: str) -> nn.initializers.Initializer:
    """Truncated normal, variance scale / fan_in; the dense layers pass their kernel as [inputs, outputs]."""
    return partitioned(nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal"), *names)


def norm(name: str | None, dtype: jnp.dtype) -> nn.RMSNorm:
    """RMSNorm over the last axis, computed in float32."""
    return nn.RMSNorm(dtype=dtype, scale_init=partitioned(nn.initializers.ones_init(), "norm"), name=name)
