"""Diagonal methods, for parameters under diagonal treatment and for grafting.

Each method maps the bias-corrected momentum and the gradient to a direction, elementwise, for arrays of any shape.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


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
    direction: Callable[[jax.Array, jax.Array | None, jax.Array, float], jax.Array]


def _moving_average(v: jax.Array, g: jax.Array, beta2: float) -> jax.Array:
    return beta2 * v + (1 - beta2) * g * g


def _sum(v: jax.Array, g: jax.Array, beta2: float) -> jax.Array:
    del beta2
    return v + g * g


def _unchanged(v: jax.Array, g: jax.Array, beta2: float) -> jax.Array:
    del g, beta2
    return v


def _adam(m: jax.Array, v: jax.Array | None, correction: jax.Array, epsilon: float) -> jax.Array:
    """Return m / (sqrt(v / correction) + epsilon) (Kingma and Ba 2015)."""
    assert v is not None
    return m / (jnp.sqrt(v / correction) + epsilon)


def _rmsprop(m: jax.Array, v: jax.Array | None, correction: jax.Array, epsilon: float) -> jax.Array:
    """Return m / sqrt(v + epsilon), without bias correction (Tieleman and Hinton 2012)."""
    del correction
    assert v is not None
    return m / jnp.sqrt(v + epsilon)


def _adagrad(m: jax.Array, v: jax.Array | None, correction: jax.Array, epsilon: float) -> jax.Array:
    """Return m / (sqrt(v) + epsilon) for a sum of squares v (Duchi et al. 2011)."""
    del correction
    assert v is not None
    return m / (jnp.sqrt(v) + epsilon)


def _sgd(m: jax.Array, v: jax.Array | None, correction: jax.Array, epsilon: float) -> jax.Array:
    del v, correction, epsilon
    return m


def _sign(m: jax.Array, v: jax.Array | None, correction: jax.Array, epsilon: float) -> jax.Array:
    """Return sign(m), whose norm is sqrt(number of non-zero entries) (`sqrt-n` grafting)."""
    del v, correction, epsilon
    return jnp.sign(m)


DIAGONALS = {
    "adam": Diagonal(True, False, _moving_average, _adam),
    "rmsprop": Diagonal(True, False, _moving_average, _rmsprop),
    "adagrad": Diagonal(True, False, _sum, _adagrad),
    "sgd": Diagonal(False, True, _unchanged, _sgd),
    "sign": Diagonal(False, False, _unchanged, _sign),
}

# Graft methods. A "_normalized" method gets each gradient divided by its norm.
GRAFTS = ("none", *DIAGONALS, *(f"{name}_normalized" for name, method in DIAGONALS.items() if method.has_second_moment))
