import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampax.framework.generation.sampling import Sampling, draw

PROBABILITIES = np.array([0.5, 0.25, 0.15, 0.06, 0.04])


def shares(sampling, rows=4000):
    """Return how often each of five tokens is drawn."""
    logits = jnp.tile(jnp.log(jnp.array(PROBABILITIES, jnp.float32)), (rows, 1))
    drawn = draw(logits, jnp.zeros(rows, jnp.uint32), jnp.arange(rows), sampling)
    return np.bincount(drawn, minlength=5) / rows


@pytest.mark.parametrize(
    ("sampling", "kept", "power"),
    [
        (Sampling(1.0, 0, 1.0), 5, 1),
        (Sampling(1.0, 3, 1.0), 3, 1),
        (Sampling(1.0, 0, 0.8), 3, 1),  # the first two have 0.75
        (Sampling(1.0, 2, 0.6), 1, 1),  # of the two that are left, the first has 2/3
        (Sampling(0.5, 0, 1.0), 5, 2),
        (Sampling(0.0, 0, 1.0), 1, 1),
        (Sampling(1.0, 9, 1.0), 5, 1),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(sampling, kept, power):
    """Faults: temperature, top_k or top_p keep other tokens or change their odds."""
    expected = np.where(np.arange(5) < kept, PROBABILITIES**power, 0)
    expected /= expected.sum()
    found = shares(sampling)
    assert found[kept:].sum() == 0
    assert np.abs(found - expected).max() < 0.03


def test_a_token_depends_on_its_own_row_only():
    """Faults: a text changes with its neighbours or its row; two prompts draw the same random numbers."""
    random = np.random.default_rng(0)
    logits = jnp.array(random.normal(size=(1, 50)).repeat(64, axis=0), jnp.float32)
    salts, positions = jnp.arange(64, dtype=jnp.uint32) // 8, jnp.arange(64) % 8
    together = draw(logits, salts, positions, Sampling(1.0))
    order = random.permutation(64)[:7]
    np.testing.assert_array_equal(together[order], draw(logits[:7], salts[order], positions[order], Sampling(1.0)))
    table = np.asarray(together).reshape(8, 8)
    assert (table[0] != table[1]).any() and (table[:, 0] != table[:, 1]).any()
    assert (together != draw(logits, salts, positions, Sampling(1.0, seed=1))).any()


def test_drawing_can_be_traced():
    """Fault: options decide about shapes with traced values."""
    shape = jax.eval_shape(
        lambda *x: draw(*x, Sampling(1.0, 3, 0.5)), jnp.zeros((2, 5)), jnp.zeros(2, jnp.uint32), jnp.zeros(2, jnp.int32)
    )
    assert (shape.shape, shape.dtype) == ((2,), jnp.int32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"seed": 2**32}, "seed=4294967296"),
    ],
)
def test_options_are_checked(fields, message):
    """Fault: an impossible option draws nonsense."""
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)
