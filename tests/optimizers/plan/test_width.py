"""Test the rules of scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampax.optimizers import ShampooOptions
from shampax.optimizers.baselines import AdamWOptions, MuonOptions

OPTIONS = {"block_size": 32, "interval": 2, "early_intervals": (), "orthogonalize": 0}
FACTORS = {"block_size": 64, "exponent": 0.5, "orthogonalize": 0}


def step(options, params, grads, names=None):
    """Return the updates of the first step, in which blocks use the graft, for a rate of 1."""
    tx = options.build(lambda count: 1.0, axis_names=names)
    return jax.jit(tx.update)(grads, tx.init(params), params)[0]


def shampoo(**options):
    return lambda wider: ShampooOptions(**OPTIONS, **options, wider=wider)


@pytest.mark.parametrize(
    "optimizer",
    [
        shampoo(),
        shampoo(graft="rmsprop_normalized"),
        shampoo(treatments=((".*", "soap block_size=8"),)),
        shampoo(treatments=((".*", "muon block_size=8"),)),
        lambda wider: AdamWOptions(wider=wider),
    ],
    ids=["shampoo", "normalized", "soap in blocks", "muon in blocks", "adamw"],
)
def test_a_step_changes_outputs_equally_at_every_width(optimizer):
    """Fault: a wider matrix changes its outputs more, so that its best learning rate is lower."""
    changes = []
    for width in (16, 64):
        signs = np.sign(np.random.default_rng(0).normal(size=width))
        params = {"w": jnp.zeros((width, width))}
        grads = {"w": jnp.asarray(np.outer(signs, signs), jnp.float32)}  # of one example with inputs `signs`
        updates = step(optimizer(width / 16), params, grads)
        changes.append(np.sqrt(np.mean((signs @ np.asarray(updates["w"])) ** 2)))
    assert changes[1] == pytest.approx(changes[0], rel=0.02)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, 1 / 4),
        ({"orthogonalize": 3}, 1 / 2),
        ({"orthogonalize": 3, "block_size": 16}, 1 / 4),
        ({"orthogonalize": 3, "block_size": 32}, 8**-0.5),
        ({"orthogonalize": 3, "graft": "none", "block_size": 16}, 1 / 4),
        ({"graft": "sgd"}, 1.0),
        ({"graft": "none"}, 1.0),
        ({"graft": "none", "block_size": 16}, 1 / 16),
        ({"graft": "none", "block_size": 16, "exponent": None}, 1 / 4),
        ({"treatments": ((".*", "muon"),)}, 1 / 2),
        ({"treatments": ((".*", "muon"),), "block_size": 16}, 1 / 4),
        ({"treatments": ((".*", "soap"),)}, 1.0),
        ({"treatments": ((".*", "soap"),), "block_size": 16}, 1 / 4),
        ({"treatments": ((".*", "diagonal"),)}, None),
    ],
    ids=str,
)
def test_factors_are_those_of_the_published_code(options, factor):
    """Fault: an optimizer gets the factor of another one."""
    params = {"bias": jnp.zeros(64), "w": jnp.zeros((64, 64))}
    layout = ShampooOptions(**(FACTORS | options), wider=4.0).build(1.0).layout(params)
    assert layout.plan.scales == ({} if factor is None else {1: factor})
    assert ("rate x" in layout.plan.treatments["w"]) == (factor is not None)


@pytest.mark.parametrize(
    "optimizer",
    [
        shampoo(weight_decay=0.5),
        shampoo(weight_decay=0.5, graft="sgd"),
        lambda wider: AdamWOptions(weight_decay=0.5, wider=wider),
        lambda wider: MuonOptions(weight_decay=0.5, wider=wider),
    ],
    ids=["shampoo", "shampoo with sgd", "adamw", "muon"],
)
def test_decay_is_divided_by_the_width_and_vectors_and_embeddings_keep_their_rate(optimizer):
    """Faults: a wide model's matrices shrink as fast as a narrow one's; embeddings, norms or biases learn slower."""
    params = {"bias": jnp.ones(8), "embed": jnp.ones((16, 8)), "w": jnp.ones((8, 8))}
    names = {"bias": ("embed",), "embed": ("vocab", "embed"), "w": ("embed", "mlp")}
    narrow, wide = (step(optimizer(wider), params, params | {"w": jnp.zeros((8, 8))}, names) for wider in (1.0, 4.0))
    np.testing.assert_allclose(narrow["w"], -0.5, rtol=1e-6)
    np.testing.assert_allclose(wide["w"], -0.125, rtol=1e-6)
    for name in ("bias", "embed"):
        np.testing.assert_array_equal(wide[name], narrow[name])
