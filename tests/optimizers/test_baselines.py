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
    [baselines.AdamWOptions(), baselines.MomentumOptions(), baselines.AdafactorOptions(), baselines.MuonOptions()],
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
