"""Momentum, second moment and the direction of the diagonal methods, for an array of any shape."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..grafting import DIAGONALS
from ..options import Options


class Moments(NamedTuple):
    """Momentum and second moment, shaped like what they belong to; None where none is kept.

    Under row-wise treatment the second moment has one number for each row, and there is no momentum.
    """

    momentum: jax.Array | None
    second_moment: jax.Array | None


def initial_moments(shape: tuple[int, ...], options: Options, *, grafts: bool = True) -> Moments:
    """Zeros for an array of a shape; no second moment where the diagonal method is never used (`grafts` is False)."""
    return Moments(
        jnp.zeros(shape, options.momentum_dtype) if options.beta1 else None,
        jnp.zeros(shape, jnp.float32) if options.diagonal.has_second_moment and grafts else None,
    )


def initial_row_moments(shape: tuple[int, ...]) -> Moments:
    """Zeros for the rows of an array of a shape."""
    return Moments(None, jnp.zeros(shape[:-1], jnp.float32))


def correction(beta: float, count: jax.Array, options: Options) -> jax.Array:
    """Divisor that makes an average of `count` terms, begun at zero, unbiased; 1 for sums and without correction."""
    if beta == 1 or not options.bias_correction:
        return jnp.float32(1)
    return jnp.where(count > 0, 1 - beta ** count.astype(jnp.float32), 1)


def advance(
    moments: Moments, g: jax.Array, step: jax.Array, beta2: float, options: Options
) -> tuple[Moments, jax.Array, jax.Array]:
    """(new moments, the momentum to act on, the diagonal method's direction; 0 where it has no second moment).

    Args:
      moments: of the step before.
      g: float32, the gradient; for a normalized graft divided by its norm.
      step: number of this step, from 1.
      beta2: of the second moment.
      options: the rest.
    """
    beta1, momentum, acting = options.beta1, moments.momentum, g
    if momentum is not None:
        new = g if options.momentum == "heavy_ball" else (1 - beta1) * g
        momentum = (beta1 * momentum.astype(jnp.float32) + new).astype(momentum.dtype)
        acting = momentum.astype(jnp.float32)
        if options.nesterov:
            acting = beta1 * acting + new
        if options.momentum == "ema":
            acting = acting / correction(beta1, step, options)
    second_moment = moments.second_moment
    if second_moment is None and options.diagonal.has_second_moment:
        return Moments(momentum, None), acting, jnp.zeros_like(g)
    if second_moment is not None:
        second_moment = options.diagonal.accumulate(second_moment, g, beta2)
    direction = options.diagonal.direction(acting, second_moment, correction(beta2, step, options), options.epsilon)
    return Moments(momentum, second_moment), acting, direction


def advance_rows(moments: Moments, g: jax.Array, epsilon: float) -> tuple[Moments, jax.Array]:
    """(new moments, direction) of row-wise AdaGrad: v <- v + mean of g^2 over the row, g / (sqrt(v) + epsilon).

    A row that nobody looks up has a gradient of zero and stays as it is, its moment too; a momentum would move it.
    After Mudigere et al., "Software-Hardware Co-design for Fast and Scalable Training of Deep Learning Recommendation
    Models" (arXiv 2104.05158).
    """
    assert moments.second_moment is not None
    second_moment = moments.second_moment + jnp.mean(g * g, axis=-1)
    direction = DIAGONALS["adagrad"].direction(g, second_moment[..., None], jnp.float32(1), epsilon)
    return Moments(None, second_moment), direction
