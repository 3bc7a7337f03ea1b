"""Parameters that carry the names of their axes: how they begin, and how a task tells the names."""

from typing import Any

import flax.linen as nn
import jax

EMBEDDING_STD = 0.02


def partitioned(initializer: nn.initializers.Initializer, *names: str | None) -> nn.initializers.Initializer:
    """An initializer whose parameter has these names for its axes."""
    return nn.with_logical_partitioning(initializer, names)


def fan_in(scale: float, *names: str | None, stacked: int = 0) -> nn.initializers.Initializer:
    """Truncated normal, variance scale / fan_in, for kernels [inputs, outputs]; dense layers pass theirs folded so.

    Args:
      scale: see above.
      *names: of the dimensions of the parameter.
      stacked: leading dimensions that stack kernels, each with the fan_in of one.
    """
    axes = tuple(range(stacked))
    return partitioned(nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal", batch_axis=axes), *names)


def axis_names(variables: dict[str, Any], boxed: Any) -> dict[str, Any]:
    """A tuple of names for each of the `variables`, as the same variables in their boxes have them.

    Raises:
      ValueError: the two trees differ.
    """
    names = jax.tree.map(
        lambda box: tuple(box.names), boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )
    return jax.tree.map(lambda _, axes: axes, variables, names)
