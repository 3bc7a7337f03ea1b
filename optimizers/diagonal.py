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

# Methods of diagonal parameters. A "_normalized" method gets each gradient divided by its norm.
METHODS = (*DIAGONALS, *(f"{name}_normalized" for name, method in DIAGONALS.items() if method.has_second_moment))
GRAFTS = ("none", *METHODS)


class Rule(NamedTuple):
    """A diagonal method with its momentum: of the graft, or of the parameters under diagonal treatment.

    Attributes:
      name: one of `METHODS`.
      beta1: decay of the momentum; 0 for no momentum.
      nesterov: whether to look one step ahead along the momentum.
      momentum: "ema" or "heavy_ball".
      momentum_dtype: dtype of the stored momentum.
      epsilon: in the denominator of the direction.
    """

    name: str
    beta1: float
    nesterov: bool
    momentum: str
    momentum_dtype: str
    epsilon: float

    @property
    def method(self) -> Diagonal:
        """Return the method."""
        return DIAGONALS[self.name.removesuffix("_normalized")]

    @property
    def normalizes(self) -> bool:
        """Return whether gradients are divided by their norm before momentum and second moment."""
        return self.name.endswith("_normalized")


def initial(shape: tuple[int, ...], rule: Rule, *, age: tuple[int, ...] = (), second_moment: bool = True) -> Moments:
    """Return zeros for an array; the second moment is None if it is not used. `age` is the shape of the ages."""
    return Moments(
        jnp.zeros(shape, rule.momentum_dtype) if rule.beta1 else None,
        jnp.zeros(shape, jnp.float32) if rule.method.has_second_moment and second_moment else None,
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


def advance(moments: Moments, g: jax.Array, beta2: float, rule: Rule) -> tuple[Moments, jax.Array, jax.Array]:
    """Return (new moments, momentum to precondition, direction of the diagonal method).

    Nesterov's momentum of an average M is (beta1 M + (1 - beta1) G) / (1 - beta1^(age + 1)), a weighted mean of the
    gradients. The direction is 0 if the method needs a second moment and `moments` has none.

    Args:
      moments: moments after the previous step.
      g: float32 gradient, divided by its norm for a "_normalized" method.
      beta2: decay of the second moment.
      rule: method and momentum.
    """
    beta1, momentum, acting, age = rule.beta1, moments.momentum, g, moments.age + 1
    if momentum is not None:
        new = g if rule.momentum == "heavy_ball" else (1 - beta1) * g
        momentum = (beta1 * momentum.astype(jnp.float32) + new).astype(momentum.dtype)
        acting = momentum.astype(jnp.float32)
        if rule.nesterov:
            acting = beta1 * acting + new
        if rule.momentum == "ema":
            acting = acting / correction(beta1, age + int(rule.nesterov), g.ndim)
    second_moment = moments.second_moment
    if second_moment is None and rule.method.has_second_moment:
        return Moments(momentum, None, age), acting, jnp.zeros_like(g)
    if second_moment is not None:
        second_moment = rule.method.accumulate(second_moment, g, beta2)
    direction = rule.method.direction(acting, second_moment, correction(beta2, age, g.ndim), rule.epsilon)
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
