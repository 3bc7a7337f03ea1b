"""Batch normalisation (Ioffe and Szegedy 2015) whose statistics are those of the global batch, or of groups of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class BatchNorm(nn.Module):
    """Normalises each channel of images [B, H, W, C] over examples and places.

    In training the mean and variance are those of the batch; in a program over a sharded batch that is the global
    batch, and two sums per channel cross the devices. With `group` they are those of `group` neighbouring examples:
    where each device holds whole groups, nothing crosses. Otherwise the running statistics of collection "batch_stats"
    serve, so that the result for an example depends on no other.

    Examples of weight 0 enter no statistics. A batch without any weight leaves the running statistics as they are.
    All arithmetic is float32.

    Attributes:
      momentum: of the running statistics; they become momentum x old + (1 - momentum) x new.
      epsilon: added to the variance.
      group: examples normalised together; 0 is the whole batch. The running statistics are of the mean over groups.
      zero_scale: begin with a scale of 0 in place of 1.
      dtype: of the result.
    """

    momentum: float
    epsilon: float
    group: int
    zero_scale: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, weights_B: jax.Array, train: bool) -> jax.Array:
        """The normalised, scaled and shifted images [B, H, W, C].

        Raises:
          ValueError: the batch does not divide into groups.
        """
        channels = x_BxHxWxC.shape[-1:]
        ones, zeros = (_of_channels(init) for init in (nn.initializers.ones_init(), nn.initializers.zeros_init()))
        scale_C = self.param("scale", zeros if self.zero_scale else ones, channels)
        bias_C = self.param("bias", zeros, channels)
        mean = self.variable("batch_stats", "mean", zeros, None, channels)
        variance = self.variable("batch_stats", "variance", ones, None, channels)
        if not train:
            factor_C = scale_C * jax.lax.rsqrt(variance.value + self.epsilon)
            x = x_BxHxWxC.astype(jnp.float32)
            return (x * factor_C + (bias_C - mean.value * factor_C)).astype(self.dtype)

        x_GxNxHxWxC = _grouped(x_BxHxWxC, self.group).astype(jnp.float32)
        weights_GxN = _grouped(weights_B, self.group).astype(jnp.float32)
        mean_GxC, variance_GxC, weight_G = _statistics(x_GxNxHxWxC, weights_GxN)
        total = weight_G.sum()
        for running, of_groups in ((mean, mean_GxC), (variance, variance_GxC)):
            new = (weight_G[:, None] * of_groups).sum(axis=0) / jnp.where(total > 0, total, 1)
            mixed = self.momentum * running.value + (1 - self.momentum) * new
            running.value = jax.lax.stop_gradient(jnp.where(total > 0, mixed, running.value))
        factor_GxC = scale_C * jax.lax.rsqrt(variance_GxC + self.epsilon)
        shift_GxC = bias_C - mean_GxC * factor_GxC
        y = x_GxNxHxWxC * factor_GxC[:, None, None, None] + shift_GxC[:, None, None, None]
        return y.reshape(x_BxHxWxC.shape).astype(self.dtype)


def _statistics(x_GxNxHxWxC: jax.Array, weights_GxN: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean and (biased) variance of each group's channels [G, C], and each group's weight [G].

    One pass over x gives both, as E[x^2] - E[x]^2: it is memory traffic that normalisation costs.
    """
    places = x_GxNxHxWxC.shape[2] * x_GxNxHxWxC.shape[3]
    weight_G = weights_GxN.sum(axis=1)
    divisor_Gx1 = places * jnp.where(weight_G > 0, weight_G, 1)[:, None]
    weighted = x_GxNxHxWxC * weights_GxN[:, :, None, None, None]
    mean_GxC = weighted.sum(axis=(1, 2, 3)) / divisor_Gx1
    square_GxC = (weighted * x_GxNxHxWxC).sum(axis=(1, 2, 3)) / divisor_Gx1
    return mean_GxC, jnp.maximum(square_GxC - jnp.square(mean_GxC), 0), weight_G


def _grouped(x_Bx: jax.Array, group: int) -> jax.Array:
    """[B, ...] to [B / group, group, ...]: neighbours along the batch, which the mesh divides in the same order."""
    examples = x_Bx.shape[0]
    group = group or examples
    if examples % group:
        raise ValueError(
            f"{examples} examples (of a micro-batch) are not divisible by task.batch_norm_group {group}; "
            f"use a divisor of {examples}, or 0 for all of them together"
        )
    return x_Bx.reshape(examples // group, group, *x_Bx.shape[1:])


def _of_channels(initializer: nn.initializers.Initializer) -> nn.initializers.Initializer:
    return nn.with_logical_partitioning(initializer, ("norm",))
