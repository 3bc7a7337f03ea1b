"""The exponential moving average (EMA) of the parameters.

With an average, the optimizer trains an iterate z, and the model is the average x of the iterates:

    W <- decay W + 1
    x <- (1 - 1 / W) x + (1 / W) z

This is `optax.ema(decay, debias=True)` of the iterates. Training is the same with and without it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Averaging:
    """The state of an average, apart from the average itself.

    Attributes:
      iterate: z, shaped like the variables.
      weight: W, a float32 scalar.
    """

    iterate: dict[str, Any]
    weight: Any


def advance(
    variables: dict[str, Any], averaging: Averaging | None, iterate: dict[str, Any], decay: float
) -> tuple[dict[str, Any], Averaging | None]:
    """Return the variables, the average or without one the iterate, and the state of the average after a step.

    Floating-point model state, such as the moments of batch normalisation, is averaged too; counts are the latest.
    """
    if averaging is None:
        return iterate, None
    weight = decay * averaging.weight + 1

    def leaf(old: jax.Array, new: jax.Array) -> jax.Array:
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return new
        between: Any = optax.incremental_update(new, old, 1 / weight)
        return between.astype(old.dtype)

    return jax.tree.map(leaf, variables, iterate), Averaging(iterate, weight)
