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
        baselines.AdafactorOptions(),
        baselines.MuonOptions(),
    ],
    ids=lambda options: type(options).__name__,
)
def test_descends(options):
    """Catches a wrong sign or a learning rate that is not applied."""
    params = parameters()
    tx = options.build(lambda count: 1e-2, axis_names=NAMES)
    state, update = tx.init(params), jax.jit(tx.update)
    first = optax.tree.norm(params)
    for _ in range(30):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert optax.tree.norm(params) < 0.95 * first


@pytest.mark.parametrize("options", [baselines.AdamWOptions, baselines.AdafactorOptions, baselines.MuonOptions])
def test_decoupled_decay_spares_biases_and_embeddings(options):
    """Catches decay on what should not decay, and decay that is not learning rate x weight decay."""
    params = parameters()
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = options(weight_decay=0.5).build(lambda count: 0.1, axis_names=NAMES)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["layers"]["out"], -0.05 * params["layers"]["out"], rtol=1e-5)
    assert not np.any(updates["bias"]) and not np.any(updates["embed"])


def test_muon_orthogonalises_each_layer_with_heads_folded():
    """Catches Muon on a wrong view of the stacked attention kernel."""
    params = parameters()
    tx = baselines.MuonOptions(beta=0.0, nesterov=False).build(lambda count: 1.0, axis_names=NAMES)
    updates, _ = tx.update(params, tx.init(params), params)
    for layer in np.asarray(updates["layers"]["out"]):
        values = np.linalg.svd(layer.reshape(8, 8), compute_uv=False)
        assert values.max() < 1.5 and np.median(values) > 0.5


def test_lamb_is_optax_lamb_for_each_layer():
    """Fault: one trust ratio for all layers of a stack, decay after the ratio or where it is not asked for."""
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


def test_lamb_leaves_biases_to_adam():
    """Fault: a bias that begins at zero stays there, its update as short as it is itself; or decays."""
    params = parameters() | {"bias": jnp.full(8, 1e-6)}
    grads = jax.tree.map(jnp.ones_like, params)
    tx = baselines.LambOptions(weight_decay=0.5).build(lambda count: 0.1, axis_names=NAMES)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["bias"], -0.1, rtol=1e-5)
    norms = [optax.tree.norm(tree["embed"]) for tree in (updates, params)]
    np.testing.assert_allclose(norms[0], 0.1 * norms[1], rtol=1e-5)
