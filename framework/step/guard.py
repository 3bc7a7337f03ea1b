"""The guard of the train step: refuse and count steps with non-finite numbers.

All decisions are scalars computed inside the step from global arrays, so that all devices decide alike.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ...optimizers.linalg.scaling import all_finite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """State of the guard, int32 scalars.

    Attributes:
      skipped: number of steps skipped.
      consecutive: number of skipped steps since the last accepted step.
      clipped: number of accepted steps whose gradient was clipped.
    """

    skipped: Any
    consecutive: Any
    clipped: Any


def initial() -> Guard:
    """Return the state before the first step."""
    return Guard(*(jnp.zeros((), jnp.int32) for _ in range(3)))


def applied(update_norm: jax.Array, new: Any, old: Any) -> jax.Array:
    """Return whether a step can still be accepted after its update: a bool scalar.

    An optimizer that refuses updates itself, such as Distributed Shampoo, counts them in a field `skipped` of its
    state. In other states no number may become infinite or NaN, for example the square of a large finite gradient.

    Args:
      update_norm: global norm of the update.
      new: optimizer and model state after the step.
      old: the same before it.
    """

    def counts(node: Any) -> bool:
        return hasattr(node, "skipped")

    fine, arrays = jnp.isfinite(update_norm), []
    for before, after in zip(*(jax.tree.leaves(tree, is_leaf=counts) for tree in (old, new)), strict=True):
        if counts(before):
            fine &= before.skipped == after.skipped
        elif jnp.issubdtype(after.dtype, jnp.floating):
            arrays.append(jnp.where(jnp.isfinite(before), after, 0))
    return fine & all_finite(arrays)


def updated(guard: Guard, accepted: jax.Array, clipped: jax.Array | bool) -> Guard:
    """Return the state after a step that was accepted or not, and whose gradient was clipped or not."""
    return Guard(
        skipped=guard.skipped + jnp.where(accepted, 0, 1),
        consecutive=jnp.where(accepted, 0, guard.consecutive + 1),
        clipped=guard.clipped + jnp.where(accepted & clipped, 1, 0),
    )
