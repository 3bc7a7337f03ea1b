import math

import jax.numpy as jnp
import numpy as np
import pytest

from shampax.models import rotary
from shampax.models.lm import LMTask


def test_rotation_against_complex_numbers():
    """Compare in float64 with multiplication by exp(i position / theta^...). Fault: wrong pairs or frequencies."""
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8))
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 1000, 0, 1]])
    pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, :, None, None] * 10_000.0 ** (-np.arange(4) / 4))
    expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
    rotation = rotary.rotary_angles(jnp.asarray(positions), 8, 10_000.0)
    np.testing.assert_allclose(rotary.rotate(jnp.asarray(x, jnp.float32), rotation), expected, atol=2e-4)


def frequencies(scaling, head_dim=8, theta=10_000.0, fraction=1.0):
    """Return the angles of position 1, from cosine and sine."""
    cos, sin = rotary.rotary_angles(jnp.ones((1, 1)), head_dim, theta, scaling, fraction)
    return np.arctan2(sin, cos)[0, 0, 0], np.hypot(cos, sin)[0, 0, 0]


def test_linear_scaling_by_hand():
    """Fault: positions are multiplied by the factor."""
    np.testing.assert_allclose(frequencies("linear factor=4")[0], [1 / 4, 0.1 / 4, 0.01 / 4, 0.001 / 4], rtol=1e-5)


def test_llama_3_scaling_by_hand():
    """Faults: short wavelengths are stretched; the bounds are those of the other factor."""
    # Wavelengths 2 pi x (1, 10, 100, 1000) turn 100, 10, 1 and 0.1 times in 200 pi positions: the first is kept, the
    # third and fourth are at or beyond `low`, and the second, at high=16, is (10 - 1) / (16 - 1) = 0.6 of the way.
    found, lengths = frequencies(f"llama3 factor=8 low=1 high=16 original={200 * math.pi}")
    np.testing.assert_allclose(found, [1, 0.1 * (0.6 + 0.4 / 8), 0.01 / 8, 0.001 / 8], rtol=1e-5)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)
    # Llama 3.1 8B: 500,000 ** (-70 / 128) turns 8192 / 2 pi times as many, 0.9975: below `low`.
    found, _ = frequencies("llama3 factor=8 low=1 high=4 original=8192", 128, 500_000.0)
    theta = 500_000.0 ** (-np.arange(64) / 64)
    assert np.flatnonzero(np.abs(found / theta - 1) > 1e-4)[0] == 29  # the first with fewer than 4 turns
    assert np.flatnonzero(found / theta < 0.1251)[0] == 35


def test_yarn_by_hand():
    """Faults: bounds of turns are not rounded outwards; the softmax's temperature is missing."""
    # Dimension d(n) = 8 ln(original / 2 pi n) / (2 ln 10,000) is ln(100) / ln(10) = 2 at one turn, and 1 at ten.
    scaling = f"yarn factor=4 original={200 * math.pi + 0.01} beta_fast=10 beta_slow=1"
    found, lengths = frequencies(scaling)
    # From floor(1.00002) = 1 to ceil(2.00002) = 3 the share that stretches rises by half a dimension.
    np.testing.assert_allclose(found, [1, 0.1, 0.01 * (0.5 + 0.5 / 4), 0.001 / 4], rtol=1e-5)
    np.testing.assert_allclose(lengths, 0.1 * math.log(4) + 1, rtol=1e-6)
    found, lengths = frequencies(scaling + " truncate=0 attention_factor=1.5")
    np.testing.assert_allclose(found, [1, 0.1, 0.01 / 4, 0.001 / 4], rtol=1e-4)
    np.testing.assert_allclose(lengths, 1.5, rtol=1e-6)


def test_a_share_of_the_dimensions_is_rotated():
    """Faults: frequencies are those of all dimensions; other dimensions than the first are rotated."""
    x = np.random.default_rng(0).normal(size=(1, 3, 1, 8)).astype(np.float32)
    positions = jnp.array([[0, 1, 7]])
    found = rotary.rotate(jnp.asarray(x), rotary.rotary_angles(positions, 8, 10_000.0, fraction=0.5))
    expected = rotary.rotate(jnp.asarray(x[..., :4]), rotary.rotary_angles(positions, 4, 10_000.0))
    np.testing.assert_allclose(found[..., :4], expected, rtol=1e-6)
    np.testing.assert_array_equal(found[..., 4:], x[..., 4:])


@pytest.mark.parametrize(
    "scaling",
    ["ntk factor=2", "linear", "linear factor=0.5", "linear factor=x", "llama3 factor=8", "yarn factor=2 beta=3"],
)
def test_scalings_are_checked(scaling):
    """Fault: a scaling without its numbers, or with a wrong name, trains another model."""
    with pytest.raises(
        ValueError, match=r"task.rope_scaling=.*: must be '' or one of 'linear factor='; 'llama3 factor="
    ):
        LMTask(rope_scaling=scaling)


@pytest.mark.parametrize("fraction", [0.0, 1.5, 0.2, math.nan])
def test_fractions_are_checked(fraction):
    """Fault: half a pair of dimensions is rotated, or none."""
    with pytest.raises(ValueError, match="must be above 0, at most 1, and rotate an even number"):
        LMTask(head_dim=16, rope_fraction=fraction)
