"""How parameters begin, with the names of their dimensions beside it."""

import flax.linen as nn


def partitioned(initializer: nn.initializers.Initializer, *names: str | None) -> nn.initializers.Initializer:
    """The initializer of a parameter whose dimensions have these logical names."""
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
