"""The norm that Transformers share."""

import flax.linen as nn
import jax.numpy as jnp

from .parameters import partitioned


def rms_norm(name: str | None, dtype: jnp.dtype) -> nn.RMSNorm:
    """RMSNorm over the last axis, computed in float32; the result has the given type."""
    return nn.RMSNorm(dtype=dtype, scale_init=partitioned(nn.initializers.ones_init(), "norm"), name=name)
