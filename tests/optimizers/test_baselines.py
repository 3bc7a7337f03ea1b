import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shampax.optimizers import baselines

NAMES = {"layers": {"out": ("layers", "heads", "kv", "embed")}, "bias": ("embed",), "embed": ("vocab", "embed")}


def parameters():
    random = np.random.default_rng(0)
    shapes = {"layers": {"out": (2, 2, 4, 8)}, "bias": (8,), "embed": (16, 8)}
    return jax.tree.map(
        lambda s: jnp.asarray(random.normal(size=s), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


@pytest.mark.parametrize(
    "options",
    [
        baselines.AdamWOptions(),
        baselines.LambOptions(),
        baselines.MomentumOptions(),
        baselines.MuonOptions(),
        baselines.AdaGradOptions(rate_rules=((".*", 10.0),)),  # its steps get smaller
    ],
    ids=lambda options: type(options).__name__,
)
def test_descends(options):
    """Faults: a wrong sign; the learning rate is not applied."""
    params = parameters()
    tx = options.build(lambda count: 1e-2, axis_names=NAMES)
    state, update = tx.init(params), jax.jit(tx.update)
    first = optax.tree.norm(params)
    for _ in range(30):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert optax.tree.norm(params) < 0.95 * first


@pytest.mark.parametrize("options", [baselines.AdamWOptions, baselines.MuonOptions, baselines.AdaGradOptions])
def test_decay_does_not_apply_to_biases_and_embeddings(options):
    """Faults: excluded parameters decay; the decay is not learning rate x weight decay."""
    params = parameters()
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = options(weight_decay=0.5).build(lambda count: 0.1, axis_names=NAMES)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["layers"]["out"], -0.05 * params["layers"]["out"], rtol=1e-5)
    assert not np.any(updates["bias"]) and not np.any(updates["embed"])


def test_muon_orthogonalises_each_layer_with_heads_folded():
    """Fault: Muon uses a wrong view of the stacked attention kernel."""
    params = parameters()
    tx = baselines.MuonOptions(beta=0.0, nesterov=False).build(lambda count: 1.0, axis_names=NAMES)
    updates, _ = tx.update(params, tx.init(params), params)
    for layer in np.asarray(updates["layers"]["out"]):
        values = np.linalg.svd(layer.reshape(8, 8), compute_uv=False)
        assert values.max() < 1.5 and np.median(values) > 0.5


def test_lamb_equals_optax_lamb_for_each_layer():
    """Faults: all layers of a stack share one trust ratio; decay is applied after the ratio or to excluded
    parameters."""
    params = parameters()
    random = np.random.default_rng(1)
    grads = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), params)
    grads["layers"]["out"] = grads["layers"]["out"].at[0].multiply(100.0)
    params["layers"]["out"] = params["layers"]["out"].at[1].multiply(7.0)
    every = ((r".*", True),)
    options = baselines.LambOptions(weight_decay=0.3, decay_rules=every, adapt_rules=every)

    def two_updates(tx, grads, params):
        state = tx.init(params)
        _, state = tx.update(grads, state, params)
        return tx.update(jax.tree.map(lambda x: x + 1, grads), state, params)[0]

    ours = two_updates(options.build(lambda count: 0.1, axis_names=NAMES), grads, params)
    reference = optax.lamb(0.1, weight_decay=0.3)

    def unstacked(tree):
        first, second = tree["layers"]["out"]
        return {"bias": tree["bias"], "embed": tree["embed"], "first": first, "second": second}

    expected = two_updates(reference, unstacked(grads), unstacked(params))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5), unstacked(ours), expected)
    plain = two_updates(options.build(lambda count: 0.1), grads, params)
    assert np.abs(plain["layers"]["out"] / ours["layers"]["out"] - 1).min() > 0.05


def test_lamb_uses_adam_for_biases():
    """Faults: a bias that starts at zero stays there, because its update is scaled to its norm; biases decay."""
    params = parameters() | {"bias": jnp.full(8, 1e-6)}
    grads = jax.tree.map(jnp.ones_like, params)
    tx = baselines.LambOptions(weight_decay=0.5).build(lambda count: 0.1, axis_names=NAMES)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["bias"], -0.1, rtol=1e-5)
    norms = [optax.tree.norm(tree["embed"]) for tree in (updates, params)]
    np.testing.assert_allclose(norms[0], 0.1 * norms[1], rtol=1e-5)


def test_muon_uses_adam_for_tables():
    """Fault: a table with the treatment "rows" counts as a matrix."""
    params = parameters()
    treatments = (("embed", "rows"), (".*", "shampoo"))
    tx = baselines.MuonOptions(treatments=treatments).build(lambda count: 1.0, axis_names=NAMES)
    same = baselines.MuonOptions().build(lambda count: 1.0, axis_names=NAMES)
    jax.tree.map(
        np.testing.assert_array_equal,
        tx.update(params, tx.init(params), params)[0],
        same.update(params, same.init(params), params)[0],
    )


def test_adagrad_equals_optax_and_is_row_wise_on_tables():
    """Faults: sums are averaged or start above zero; there is momentum; a factor is lost; a table is summed by
    element."""
    params = parameters()
    options = baselines.AdaGradOptions(epsilon=1e-3, rate_rules=(("bias", 2.0), (".*", 1.0)))
    tx, twin = options.build(lambda count: 0.1), optax.adagrad(0.1, initial_accumulator_value=0.0, eps=0.0)
    state, twin_state, by_row = tx.init(params), twin.init(params), np.zeros(16)
    random = np.random.default_rng(1)
    for _ in range(5):
        grads = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), params)
        updates, state = tx.update(grads, state, params)
        wanted, twin_state = twin.update(grads, twin_state, params)
        by_row += (np.asarray(grads["embed"], np.float64) ** 2).mean(axis=1)
    # Ours adds epsilon to the root, optax does not.
    out = updates["layers"]["out"] * (1 + 1e-3 * np.abs(wanted["layers"]["out"] / (0.1 * grads["layers"]["out"])))
    np.testing.assert_allclose(out, wanted["layers"]["out"], rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], 2 * wanted["bias"], rtol=5e-3)
    table = -0.1 * np.asarray(grads["embed"]) / (np.sqrt(by_row)[:, None] + 1e-3)
    np.testing.assert_allclose(updates["embed"], table, rtol=1e-5)


class Falling:
    """A rate that halves at each step, and its peak."""

    peak = 0.1

    def __call__(self, count):
        return self.peak * 0.5**count


def two_steps(options, grads, params, rate, compiled=jax.jit):
    tx = options.build(rate, axis_names={name: NAMES.get(name, ("embed",)) for name in params})
    update = compiled(tx.update)
    _, state = update(grads, compiled(tx.init)(params), params)
    return update(grads, state, params)[0]


def test_adamw_equals_optax_adamw():
    """Fault: decay and rate are applied in another order."""
    params = parameters()
    random = np.random.default_rng(1)
    grads = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), params)
    every = ((r".*", True),)
    chosen = baselines.AdamWOptions(weight_decay=0.3, decay_rules=every)
    # Op by op: XLA may round one formula in two programs differently.
    ours = two_steps(chosen, grads, params, Falling(), compiled=lambda function: function)
    twin = optax.adamw(Falling(), b2=0.99, weight_decay=0.3)
    _, state = twin.update(grads, twin.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, ours, twin.update(grads, state, params)[0])
