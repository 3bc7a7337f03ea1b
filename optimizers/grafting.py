"""Diagonal methods: what a parameter under `diagonal` treatment uses, and what gives a Shampoo update its norm.

Each method turns the (bias-corrected) momentum and the gradient into a direction, elementwise, so it runs
alike on a parameter in its own shape and on a bucket of blocks. One registry: any diagonal method can graft.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Diagonal(NamedTuple):
    """A diagonal method.

    Attributes:
      has_second_moment: whether it keeps an accumulator shaped like the parameter.
      follows_scale: whether twice the gradients make twice the direction; otherwise they leave it as it is.
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
    """Kingma and Ba 2015: m / (sqrt(v / correction) + epsilon)."""
    assert v is not None
    return m / (jnp.sqrt(v / correction) + epsilon)


def _rmsprop(m: jax.Array, v: jax.Array | None, correction: jax.Array, epsilon: float) -> jax.Array:
    """Tieleman and Hinton 2012, without bias correction: m / sqrt(v + epsilon)."""
    del correction
    assert v is not None
    return m / jnp.sqrt(v + epsilon)


def _adagrad(m: jax.Array, v: jax.Array | None, correction: jax.Array, epsilon: float) -> jax.Array:
    """Duchi et al. 2011: m / (sqrt(sum of squares) + epsilon)."""
    del correction
    assert v is not None
    return m / (jnp.sqrt(v) + epsilon)


def _sgd(m: jax.Array, v: jax.Array | None, correction: jax.Array, epsilon: float) -> jax.Array:
    del v, correction, epsilon
    return m


def _sign(m: jax.Array, v: jax.Array | None, correction: jax.Array, epsilon: float) -> jax.Array:
    """Norm sqrt(number of non-zero entries), whatever the gradient's scale (`sqrt-n` grafting)."""
    del v, correction, epsilon
    return jnp.sign(m)


DIAGONALS = {
    "adam": Diagonal(True, False, _moving_average, _adam),
    "rmsprop": Diagonal(True, False, _moving_average, _rmsprop),
    "adagrad": Diagonal(True, False, _sum, _adagrad),
    "sgd": Diagonal(False, True, _unchanged, _sgd),
    "sign": Diagonal(False, False, _unchanged, _sign),
}

# What an update may take its norm from. A normalized form sees each gradient divided by its norm.
GRAFTS = ("none", *DIAGONALS, *(f"{name}_normalized" for name, method in DIAGONALS.items() if method.has_second_moment))
