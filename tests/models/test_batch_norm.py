import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampax.models.batch_norm import BatchNorm

SHAPE = (8, 3, 5, 4)
WEIGHTS = np.array([1, 1, 0, 1, 1, 1, 1, 0], np.float32)


def norm_of(**changes):
    return BatchNorm(**{"momentum": 0.8, "group": 0, "zero_scale": False, "dtype": np.float32} | changes)


def images():
    return np.random.default_rng(0).normal(2, 3, SHAPE).astype(np.float32)


def variables():
    random = np.random.default_rng(1)
    drawn = {name: random.uniform(0.5, 2, 4).astype(np.float32) for name in ("scale", "bias", "mean", "variance")}
    params, state = {name: drawn[name] for name in ("scale", "bias")}, {k: drawn[k] for k in ("mean", "variance")}
    return {"params": params, "batch_stats": state}


@functools.partial(jax.jit, static_argnums=0)
def trained(norm, variables, x, weights):
    return norm.apply(variables, x, weights, True, mutable=["batch_stats"])


def reference(x, weights, group, momentum=0.8, epsilon=1e-5):
    """Compute in float64, group by group, from the examples with weight."""
    values, x = variables(), x.astype(np.float64)
    result, means, variances, counts = np.zeros_like(x), [], [], []
    for start in range(0, len(x), group):
        rows = slice(start, start + group)
        kept = x[rows][weights[rows] > 0]
        counts.append(len(kept))
        mean, variance = (kept.mean((0, 1, 2)), kept.var((0, 1, 2))) if len(kept) else (np.zeros(4), np.zeros(4))
        means.append(mean), variances.append(variance)
        standard = (x[rows] - mean) / np.sqrt(variance + epsilon)
        result[rows] = standard * values["params"]["scale"] + values["params"]["bias"]
    running = {}
    for name, of_groups in (("mean", means), ("variance", variances)):
        new = np.average(of_groups, axis=0, weights=counts)
        running[name] = momentum * values["batch_stats"][name] + (1 - momentum) * new
    return result, running


@pytest.mark.parametrize("group", [0, 8, 4, 2])
@pytest.mark.parametrize("weights", [np.ones(8, np.float32), WEIGHTS])
def test_against_numpy(group, weights):
    """Faults: statistics over the wrong axes or examples; a wrong divisor; wrong running statistics."""
    result, state = trained(norm_of(group=group), variables(), images(), weights)
    expected, running = reference(images(), weights, group or 8)
    kept = weights > 0
    np.testing.assert_allclose(np.asarray(result)[kept], expected[kept], rtol=1e-4, atol=1e-4)
    for name, values in running.items():
        np.testing.assert_allclose(state["batch_stats"][name], values, rtol=1e-5)


def test_examples_without_weight_change_nothing():
    """Fault: padding examples enter a batch's statistics or their gradient."""
    x, norm = images(), norm_of()

    def of(x, weights):
        (result, state) = trained(norm, variables(), x, weights)
        return jnp.where(weights[:, None, None, None] > 0, result, 0), state

    gradient = jax.grad(lambda x: jnp.square(of(x, WEIGHTS)[0]).sum())(x)
    assert (np.asarray(gradient)[WEIGHTS == 0] == 0).all()
    other = np.where(WEIGHTS[:, None, None, None] > 0, x, 1e4).astype(np.float32)
    for left, right in zip(jax.tree.leaves(of(x, WEIGHTS)), jax.tree.leaves(of(other, WEIGHTS)), strict=True):
        np.testing.assert_array_equal(left, right)
    _, state = trained(norm, variables(), x, np.zeros(8, np.float32))
    for name, values in variables()["batch_stats"].items():
        np.testing.assert_array_equal(state["batch_stats"][name], values)


def test_a_group_without_weight_does_not_change_running_statistics():
    """Faults: a division by zero; running statistics move towards zero."""
    weights = np.array([0, 0, 1, 1, 1, 1, 1, 1], np.float32)
    result, state = trained(norm_of(group=2), variables(), images(), weights)
    _, running = reference(images(), weights, 2)
    assert np.isfinite(result).all()
    for name, values in running.items():
        np.testing.assert_allclose(state["batch_stats"][name], values, rtol=1e-5)


def test_evaluation_uses_running_statistics():
    """Faults: evaluation uses the batch's statistics, the variance instead of the deviation, or no epsilon."""
    values, x = variables(), images()
    result = norm_of().apply(values, x, WEIGHTS, False)
    state, params = values["batch_stats"], values["params"]
    expected = (x - state["mean"]) / np.sqrt(state["variance"] + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_initial_statistics_and_scales():
    """Faults: initial statistics or scales are not 0 and 1; an initialisation updates them."""
    for zero_scale in (False, True):
        made = norm_of(zero_scale=zero_scale).init(jax.random.key(0), images(), WEIGHTS, False)
        flat = {name: np.asarray(made[kind][name].value) for kind in made for name in made[kind]}
        expected = {"scale": 0.0 if zero_scale else 1.0, "bias": 0.0, "mean": 0.0, "variance": 1.0}
        assert {name: set(array.tolist()) for name, array in flat.items()} == {k: {v} for k, v in expected.items()}


def test_statistics_are_float32():
    """Fault: bfloat16 sums stop growing after a few hundred terms."""
    x = jnp.asarray(np.random.default_rng(0).normal(1, 1, (8, 16, 16, 4)), jnp.bfloat16)
    result, state = trained(norm_of(dtype=jnp.dtype("bfloat16"), momentum=0.0), variables(), x, np.ones(8, np.float32))
    assert result.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(state["batch_stats"]["mean"], exact.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(state["batch_stats"]["variance"], exact.var((0, 1, 2)), rtol=1e-4)


def test_groups_must_divide_the_batch():
    """Fault: a reshape error that has neither number."""
    with pytest.raises(ValueError, match=r"task.batch_norm_group=3: must divide the 8 examples"):
        trained(norm_of(group=3), variables(), images(), WEIGHTS)
