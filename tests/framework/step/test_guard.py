from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampax.framework.step import guard


def test_counts():
    """Faults: a skipped step counts as clipped; consecutive skips are not reset."""
    state, counts = guard.initial(), []
    for accepted, clipped in ((True, True), (False, True), (False, False), (True, False), (False, True)):
        state = guard.updated(state, jnp.asarray(accepted), jnp.asarray(clipped))
        counts.append((int(state.skipped), int(state.consecutive), int(state.clipped)))
    assert counts == [(0, 0, 1), (1, 1, 1), (2, 2, 1), (2, 0, 1), (3, 1, 1)]


class Counting(NamedTuple):
    """The state of an optimizer that refuses updates itself."""

    moment: jax.Array
    skipped: jax.Array


@pytest.mark.parametrize(
    ("norm", "before", "after", "fine"),
    [
        (1.0, {"m": [1.0, np.inf]}, {"m": [2.0, np.inf]}, True),  # some optimizers begin with infinity
        (np.inf, {"m": [1.0]}, {"m": [1.0]}, False),
        (np.nan, {}, {}, False),
        (1.0, {"m": [1.0, 2.0], "count": 3}, {"m": [1.0, np.inf], "count": 4}, False),
        (1.0, {"m": [1.0]}, {"m": [np.nan]}, False),
        (1.0, (Counting([1.0], 3), {"m": [0.0]}), (Counting([2.0], 3), {"m": [1.0]}), True),
        (0.0, (Counting([1.0], 3), {"m": [0.0]}), (Counting([1.0], 4), {"m": [0.0]}), False),
    ],
)
def test_an_update_is_refused_if_the_optimizer_refuses_it_or_its_state_overflows(norm, before, after, fine):
    """Faults: a refusal inside a chain is not seen; a second moment becomes infinite for good; an optimizer whose state
    begins with infinity never takes a step."""
    before, after = (
        jax.tree.map(np.asarray, tree, is_leaf=lambda leaf: isinstance(leaf, list)) for tree in (before, after)
    )
    assert bool(guard.applied(jnp.float32(norm), after, before)) == fine
