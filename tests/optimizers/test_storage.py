"""Numbers kept as bytes: how close they come back, and that averages of them do not stand still."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizing import gradients, train

from shampax.optimizers import ShampooOptions, storage


@pytest.mark.parametrize("shape", [(1, 1), (17, 8), (24, 128), (200, 200)])
def test_bytes_come_back_within_half_a_unit(shape):
    """Catches groups, exponents or padding that are mixed up, at any scale a float32 has."""
    random = np.random.default_rng(0)
    x = random.normal(size=(5, *shape)) * 2.0 ** random.integers(-110, 110, size=(5, 1, 1))
    x[2] = 0
    x = x.astype(np.float32)
    kept = jax.jit(lambda x: storage.stored(x, "int8"))(x)
    assert kept.dtype == jnp.int8 and kept.shape == (5, *storage.shape_of(shape, "int8"))
    back = np.asarray(jax.jit(lambda kept: storage.loaded(kept, shape))(kept))
    groups = np.pad(x.reshape(5, -1), ((0, 0), (0, -x[0].size % 32))).reshape(5, -1, 32)
    largest = np.repeat(np.abs(groups).max(axis=-1), 32, axis=-1)[:, : x[0].size].reshape(x.shape)
    assert np.all(np.abs(back - x) <= largest * 2.0**-6 / 2)
    assert not np.any(back[2])


def test_the_error_that_is_reported_is_the_error_that_is_made():
    """Catches a report that flatters, for each type and for rounding at random."""
    x = np.random.default_rng(0).normal(size=(3, 64, 128)).astype(np.float32)
    for dtype, dithered in (("int8", False), ("int8", True), ("bfloat16", False)):

        @jax.jit
        def there_and_back(x):
            kept = storage.stored(x, dtype, dithered=dithered)
            return storage.loaded(kept, (64, 128)), storage.rounding(kept, dithered=dithered)

        back, reported = there_and_back(x)
        made = np.linalg.norm(back - x, axis=(-2, -1)) / np.linalg.norm(x, axis=(-2, -1))
        np.testing.assert_allclose(reported, made, rtol=0.15)


def test_an_average_whose_new_part_is_below_a_unit_moves():
    """Catches rounding to the nearest, under which 1 % of a new mean would be lost on every step."""
    random = np.random.default_rng(0)

    @jax.jit
    def advance(kept, x):
        return storage.stored(0.99 * storage.loaded(kept, (64, 128)) + 0.01 * x, "int8", dithered=True)

    kept, exact = storage.stored(jnp.ones((1, 64, 128)), "int8"), np.ones((1, 64, 128))
    for _ in range(300):
        x = 0.5 + 0.1 * random.normal(size=(1, 64, 128))
        kept, exact = advance(kept, jnp.asarray(x, jnp.float32)), 0.99 * exact + 0.01 * x
    found = np.asarray(storage.loaded(kept, (64, 128)))
    assert abs(found.mean() - exact.mean()) < 0.002
    assert np.std(found - exact) < 0.03


@pytest.mark.filterwarnings("ignore:statistics_dtype:UserWarning")
@pytest.mark.parametrize("kind", ["shampoo", "soap"])
def test_updates_from_bytes_are_those_from_floats_within_their_rounding(kind):
    """Catches bytes that are read as another side's, or roots that are not scaled back; and that they take the room
    they are meant to take."""
    stream = gradients(8, {"w": (64, 40)})
    # The first basis is of statistics of full rank: rounding turns that of others anywhere.
    values = {
        "block_size": 32,
        "interval": 2,
        "ridge": 3e-2,
        "treatments": ((".*", kind),),
        "start_step": 5,
        "solver": "eigh",
    }
    exact = train(ShampooOptions(**values), stream)
    run = train(ShampooOptions(**values, statistics_dtype="int8", roots_dtype="int8"), stream)
    here, there = (np.asarray(r.updates[-1]["w"], np.float64) for r in (run, exact))
    assert np.linalg.norm(here - there) <= 0.15 * np.linalg.norm(there)

    def taken(run):
        return sum(
            array.nbytes for b in run.states[-1].buckets.values() for array in (*b.roots.statistics, *b.roots.roots)
        )

    assert taken(run) <= 0.4 * taken(exact)
