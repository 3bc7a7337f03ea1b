"""Diagonal methods: momentum, second moment and direction of each element, for arrays of any shape.

They update the parameters under diagonal treatment, and define the norms of preconditioned updates (grafting).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Moments(NamedTuple):
    """Momentum and second moment of one parameter, or of the blocks of a bucket.

    Attributes:
      momentum: shaped like the parameter or the blocks; None without momentum.
      second_moment: shaped alike, or for row-wise treatment one number per row; None if the method has none.
      age: int32, scalar or [blocks], number of steps in the moments.
    """

    momentum: jax.Array | None
    second_moment: jax.Array | None
    age: jax.Array


class Diagonal(NamedTuple):
    """A diagonal method.

    Attributes:
      has_second_moment: whether it keeps an accumulator shaped like the parameter.
      follows_scale: whether the direction is proportional to the gradients, or else independent of their scale.
      accumulate: (second moment, gradient, beta2) -> second moment.
      direction: (momentum, second moment, bias correction of the second moment, epsilon) -> direction.
    """

    has_second_moment: bool
    follows_scale: bool
    accumulate: Callable[[jax.Array, jax.Array, float], jax.Array]
    direction: Callable[[jax.Array, Any, jax.Array, float], jax.Array]


def _average(v: jax.Array, g: jax.Array, beta2: float) -> jax.Array:
    return beta2 * v + (1 - beta2) * g * g


def _sum(v: jax.Array, g: jax.Array, beta2: float) -> jax.Array:
    del beta2
    return v + g * g


DIAGONALS = {
    # Kingma and Ba 2015
    "adam": Diagonal(True, False, _average, lambda m, v, bias, epsilon: m / (jnp.sqrt(v / bias) + epsilon)),
    # Tieleman and Hinton 2012
    "rmsprop": Diagonal(True, False, _average, lambda m, v, bias, epsilon: m / jnp.sqrt(v / bias + epsilon)),
    # Duchi et al. 2011
    "adagrad": Diagonal(True, False, _sum, lambda m, v, bias, epsilon: m / (jnp.sqrt(v) + epsilon)),
    "sgd": Diagonal(False, True, _sum, lambda m, v, bias, epsilon: m),
}

# Graft methods. A "_normalized" method gets each gradient divided by its norm.
GRAFTS = ("none", *DIAGONALS, *(f"{name}_normalized" for name, method in DIAGONALS.items() if method.has_second_moment))


def initial(shape: tuple[int, ...], options: Any, *, age: tuple[int, ...] = (), second_moment: bool = True) -> Moments:
    """Return zeros for an array; the second moment is None if it is not used. `age` is the shape of the ages."""
    return Moments(
        jnp.zeros(shape, options.momentum_dtype) if options.beta1 else None,
        jnp.zeros(shape, jnp.float32) if options.diagonal.has_second_moment and second_moment else None,
        jnp.zeros(age, jnp.int32),
    )


def initial_rows(shape: tuple[int, ...]) -> Moments:
    """Return zeros for row-wise treatment of an array."""
    return Moments(None, jnp.zeros(shape[:-1], jnp.float32), jnp.zeros((), jnp.int32))


def correction(beta: float, age: jax.Array, rank: int = 0) -> jax.Array:
    """Return the bias correction 1 - beta^age of an average, or 1 for a sum (beta 1) or at age 0.

    The result is shaped like `age`, followed by axes of length 1 up to `rank` axes.
    """
    result = jnp.float32(1) if beta == 1 else jnp.where(age > 0, 1 - beta ** age.astype(jnp.float32), 1)
    return result.reshape(*result.shape, *[1] * (rank - result.ndim)) if result.ndim else result


def advance(moments: Moments, g: jax.Array, beta2: float, options: Any) -> tuple[Moments, jax.Array, jax.Array]:
    """Return (new moments, momentum to precondition, direction of the diagonal method).

    Nesterov's momentum of an average M is (beta1 M + (1 - beta1) G) / (1 - beta1^(age + 1)), a weighted mean of the
    gradients. The direction is 0 if the method needs a second moment and `moments` has none.

    Args:
      moments: moments after the previous step.
      g: float32 gradient, divided by its norm for a "_normalized" graft.
      beta2: decay of the second moment.
      options: options of the optimizer.
    """
    beta1, momentum, acting, age = options.beta1, moments.momentum, g, moments.age + 1
    if momentum is not None:
        new = g if options.momentum == "heavy_ball" else (1 - beta1) * g
        momentum = (beta1 * momentum.astype(jnp.float32) + new).astype(momentum.dtype)
        acting = momentum.astype(jnp.float32)
        if options.nesterov:
            acting = beta1 * acting + new
        if options.momentum == "ema":
            acting = acting / correction(beta1, age + int(options.nesterov), g.ndim)
    second_moment = moments.second_moment
    if second_moment is None and options.diagonal.has_second_moment:
        return Moments(momentum, None, age), acting, jnp.zeros_like(g)
    if second_moment is not None:
        second_moment = options.diagonal.accumulate(second_moment, g, beta2)
    direction = options.diagonal.direction(acting, second_moment, correction(beta2, age, g.ndim), options.epsilon)
    return Moments(momentum, second_moment, age), acting, direction


def advance_rows(moments: Moments, g: jax.Array, epsilon: float) -> tuple[Moments, jax.Array]:
    """Return (new moments, direction) of row-wise AdaGrad: v <- v + mean of g^2 over the row, g / (sqrt(v) + epsilon).

    A row that is not looked up has a zero gradient and does not change, because there is no momentum. Source: Mudigere
    et al., "Software-Hardware Co-design for Fast and Scalable Training of Deep Learning Recommendation Models" (arXiv
    2104.05158).
    """
    assert moments.second_moment is not None
    second_moment = moments.second_moment + jnp.mean(g * g, axis=-1)
    return Moments(None, second_moment, moments.age + 1), g / (jnp.sqrt(second_moment[..., None]) + epsilon)
