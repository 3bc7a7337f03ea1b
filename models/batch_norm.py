"""Batch normalisation (Ioffe and Szegedy 2015) with the statistics of the global batch or of groups of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from .modules import partitioned

_EPSILON = 1e-5  # added to the variance


class BatchNorm(nn.Module):
    """Normalises each channel of images [B, H, W, C] over examples and places.

    In training it uses the mean and variance of the global batch, whose two sums per channel cross the devices; with
    `group`, those of `group` neighbouring examples, which cross nothing if each device holds whole groups. In
    evaluation it uses the running statistics of collection "batch_stats", so that an example's result depends on no
    other.

    Examples of weight 0 do not enter the statistics. A batch without any weight leaves the running statistics
    unchanged. All arithmetic is float32.

    Attributes:
      momentum: of the running statistics: momentum x old + (1 - momentum) x new.
      group: examples normalised together; 0 is the whole batch. Running statistics follow the mean over groups.
      zero_scale: whether the scale begins at 0 instead of 1.
      dtype: type of the result.
    """

    momentum: float
    group: int
    zero_scale: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, weights_B: jax.Array, train: bool) -> jax.Array:
        """Return the normalised, scaled and shifted images [B, H, W, C].

        Raises:
          ValueError: the batch does not divide into groups.
        """
        channels = x_BxHxWxC.shape[-1:]
        ones, zeros = (partitioned(init, "norm") for init in (nn.initializers.ones, nn.initializers.zeros))
        scale_C = self.param("scale", zeros if self.zero_scale else ones, channels)
        bias_C = self.param("bias", zeros, channels)
        mean = self.variable("batch_stats", "mean", zeros, None, channels)
        variance = self.variable("batch_stats", "variance", ones, None, channels)
        if train:
            x_GxNxHxWxC, weights_GxN = _grouped(x_BxHxWxC, self.group), _grouped(weights_B, self.group)
            mean_GxC, variance_GxC, weight_G = _statistics(x_GxNxHxWxC, weights_GxN)
            total = weight_G.sum()
            for running, of_groups in ((mean, mean_GxC), (variance, variance_GxC)):
                new = (weight_G[:, None] * of_groups).sum(axis=0) / jnp.where(total > 0, total, 1)
                mixed = self.momentum * running.value + (1 - self.momentum) * new
                running.value = jax.lax.stop_gradient(jnp.where(total > 0, mixed, running.value))
        else:
            x_GxNxHxWxC = _grouped(x_BxHxWxC, 0)
            mean_GxC, variance_GxC = mean.value[None], variance.value[None]
        factor_GxC = scale_C * jax.lax.rsqrt(variance_GxC + _EPSILON)
        shift_GxC = bias_C - mean_GxC * factor_GxC
        y = x_GxNxHxWxC * factor_GxC[:, None, None, None] + shift_GxC[:, None, None, None]
        return y.reshape(x_BxHxWxC.shape).astype(self.dtype)


def _statistics(x_GxNxHxWxC: jax.Array, weights_GxN: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return mean and (biased) variance of each group's channels [G, C], and each group's weight [G].

    One pass over x gives both, as E[x^2] - E[x]^2, because memory traffic dominates the cost of normalisation.
    """
    places = x_GxNxHxWxC.shape[2] * x_GxNxHxWxC.shape[3]
    weight_G = weights_GxN.sum(axis=1)
    divisor_Gx1 = places * jnp.where(weight_G > 0, weight_G, 1)[:, None]
    weighted = x_GxNxHxWxC * weights_GxN[:, :, None, None, None]
    mean_GxC = weighted.sum(axis=(1, 2, 3)) / divisor_Gx1
    square_GxC = (weighted * x_GxNxHxWxC).sum(axis=(1, 2, 3)) / divisor_Gx1
    return mean_GxC, jnp.maximum(square_GxC - jnp.square(mean_GxC), 0), weight_G


def _grouped(x_Bx: jax.Array, group: int) -> jax.Array:
    """Return float32 [B / group, group, ...]; groups are neighbours in the batch, as the mesh divides it."""
    examples = x_Bx.shape[0]
    group = group or examples
    if examples % group:
        raise ValueError(
            f"task.batch_norm_group={group}: must divide the {examples} examples of a micro-batch; 0 takes all"
        )
    return x_Bx.reshape(examples // group, group, *x_Bx.shape[1:]).astype(jnp.float32)
