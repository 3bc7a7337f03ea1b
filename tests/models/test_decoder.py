"""Check the knobs of today's decoders against a NumPy reference."""

import dataclasses

import decoder_reference
import jax
import numpy as np
import pytest
from lm_cases import SMALL, assert_close, batch_of, quick_jit, variables_of

KNOBS = {
    "llama": {"norm_epsilon": 1e-2, "rope_scaling": "linear factor=3"},
    "neox": {"rope_fraction": 0.5},
    "qwen 2": {"qkv_bias": True},
    "qwen 3": {"qk_norm": "head"},
    "olmo 2": {"qk_norm": "all", "norms": "post", "tied_head": False, "norm_epsilon": 1e-2},
    "gemma 2": {
        "norms": "sandwich",
        "activation": "gelu",
        "embedding_scale": 32**0.5,
        "attention_soft_cap": 0.5,
        "attention_scale": 0.1,
        "logit_soft_cap": 0.5,
    },
}


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_logits_and_gradients_against_a_reference(knobs):
    """Faults: a knob does nothing, acts at another place of the block, or has a wrong gradient."""
    task = dataclasses.replace(SMALL, **knobs)
    batch, variables = batch_of(), variables_of(task)
    params = variables["params"]
    real = batch["segments"][:, :-1, None] > 0
    random = np.random.default_rng(2)
    wanted = random.normal(size=(4, 16, 64)) * real

    def total(params):
        logits = task.logits({"params": params}, batch)[0]
        return (logits * wanted).sum(), logits

    gradient, found = quick_jit(jax.grad(total, has_aux=True))(params)
    expected = decoder_reference.logits(task, params, batch)
    assert_close(found * real, expected * real, 2e-5)
    # Along a random direction of each parameter the gradient is a difference of the reference.
    for at, leaf in enumerate(jax.tree.leaves(params)):
        step = 1e-5 * random.normal(size=leaf.shape)

        def moved(by, at=at, step=step):
            leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]
            leaves[at] += by * step
            return (
                decoder_reference.logits(task, jax.tree.unflatten(jax.tree.structure(params), leaves), batch) * wanted
            ).sum()

        rise = moved(1) - moved(-1)
        slope = 2 * (np.asarray(jax.tree.leaves(gradient)[at], np.float64) * step).sum()
        assert abs(rise - slope) < 1e-3 * max(abs(rise), 2 * np.linalg.norm(jax.tree.leaves(gradient)[at]) * 1e-5)
    assert np.abs(expected - decoder_reference.logits(SMALL, variables_of(SMALL)["params"], batch)).max() > 1e-3
