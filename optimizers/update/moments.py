"""Momentum, second moment and direction of the diagonal methods, for arrays of any shape."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..grafting import DIAGONALS
from ..options import Options


class Moments(NamedTuple):
    """Momentum and second moment, shaped like the parameter or the blocks, or None.

    Under row-wise treatment the second moment has one number per row, and the momentum is None.
    """

    momentum: jax.Array | None
    second_moment: jax.Array | None


def initial_moments(shape: tuple[int, ...], options: Options, *, grafts: bool = True) -> Moments:
    """Return zeros for an array; the second moment is None if it is not used (`grafts` is False)."""
    return Moments(
        jnp.zeros(shape, options.momentum_dtype) if options.beta1 else None,
        jnp.zeros(shape, jnp.float32) if options.diagonal.has_second_moment and grafts else None,
    )


def initial_row_moments(shape: tuple[int, ...]) -> Moments:
    """Return zeros for row-wise treatment of an array."""
    return Moments(None, jnp.zeros(shape[:-1], jnp.float32))


def correction(beta: float, count: jax.Array, options: Options) -> jax.Array:
    """Return the bias correction 1 - beta^count of an average, or 1 for sums and without bias correction."""
    if beta == 1 or not options.bias_correction:
        return jnp.float32(1)
    return jnp.where(count > 0, 1 - beta ** count.astype(jnp.float32), 1)


def advance(
    moments: Moments, g: jax.Array, step: jax.Array, beta2: float, options: Options
) -> tuple[Moments, jax.Array, jax.Array]:
    """Return (new moments, momentum to precondition, direction of the diagonal method).

    The direction is 0 if the diagonal method needs a second moment and `moments` has none.

    Args:
      moments: moments after the previous step.
      g: float32 gradient, divided by its norm for a "_normalized" graft.
      step: int32, number of this step, from 1.
      beta2: decay of the second moment.
      options: options of the optimizer.
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
    """Return (new moments, direction) of row-wise AdaGrad: v <- v + mean of g^2 over the row, g / (sqrt(v) + epsilon).

    A row that is not looked up has a zero gradient and does not change, because there is no momentum. Source: Mudigere
    et al., "Software-Hardware Co-design for Fast and Scalable Training of Deep Learning Recommendation Models" (arXiv
    2104.05158).
    """
    assert moments.second_moment is not None
    second_moment = moments.second_moment + jnp.mean(g * g, axis=-1)
    direction = DIAGONALS["adagrad"].direction(g, second_moment[..., None], jnp.float32(1), epsilon)
    return Moments(None, second_moment), direction
