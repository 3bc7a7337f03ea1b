"""Keys and values in a cache: prefill and decode against whole rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from lm_cases import LATENTS, SMALL, SPECS, assert_close, batch_of, logits_of, variables_of
from traced import quick_jit

from shampax.framework.sharding import placement

LENGTHS = (5, 9, 1, 12, 0, 12, 2, 7)  # of prompts of rows of 17 tokens; one row has none
PADDED, SLOTS = 12, 20
KNOBS = {
    "plain": {},
    "sandwich": {
        "layers": 3,
        "layer_pattern": ("local", "global"),
        "attention_window": 4,
        "local_rope_theta": 100.0,
        "rope_scaling": "linear factor=8",
        "norms": "sandwich",
        "qk_norm": "head",
        "activation": "gelu",
        "embedding_scale": 5.5,
        "attention_scale": 0.3,
        "attention_soft_cap": 2.0,
        "logit_soft_cap": 3.0,
    },
    "sinks": {
        "attention_window": 4,
        "attention_sinks": True,
        "rope_scaling": "yarn factor=4 original=8",
        "rope_fraction": 0.5,
        "norms": "post",
        "qk_norm": "all",
        "qkv_bias": True,
        "tied_head": False,
    },
    "adapters": {"lora_rank": 3, "layer_pattern": ("local", "global"), "attention_window": 4},
    "experts": {"experts": 4, "dense_layers": 1, "balance_rate": 1e-3, "router": "sigmoid", "remat": "full"},
    "latents": LATENTS | {"lora_rank": 3, "lora_targets": ("query_up", "latent_down", "latent_up")},
    "latents and windows": LATENTS
    | {"query_latent_dim": 0, "layer_pattern": ("local", "global"), "attention_window": 4, "attention_sinks": True},
}


@functools.partial(quick_jit, static_argnums=(0, 4))
def prefill(task, variables, tokens, real, slots):
    return task.prefill(variables, tokens, real, slots)


@functools.partial(quick_jit, static_argnums=0, donate_argnums=3)
def decode(task, variables, tokens, cache):
    return task.decode(variables, tokens, cache)


def padded(tokens, side):
    """Return the prompts, padded on one side with tokens that must not matter."""
    real = np.arange(PADDED) < np.array(LENGTHS)[:, None]
    rows = np.where(real, tokens[:, :PADDED], 7)
    if side == "left":
        for row, length in enumerate(LENGTHS):
            rows[row], real[row] = np.roll(rows[row], PADDED - length), np.roll(real[row], PADDED - length)
    return rows, real


def continued(task, variables, tokens, side):
    """Return the logits after each prompt and after each of the next four tokens, [5, B, V]."""
    logits, cache = prefill(task, variables, *padded(tokens, side), SLOTS)
    found = [logits]
    for step in range(4):
        following = np.array([row[length + step] for row, length in zip(tokens, LENGTHS, strict=True)])
        logits, cache = decode(task, variables, jnp.asarray(following, jnp.int32), cache)
        found.append(logits)
    return np.stack(found)


def whole(task, variables, tokens):
    """Return the same from whole rows."""
    batch = batch_of([[1] * 17] * len(LENGTHS)) | {"tokens": tokens}
    logits = np.asarray(logits_of(task, variables, batch))
    rows = np.arange(len(LENGTHS))
    return np.stack([logits[rows, np.array(LENGTHS) - 1 + step] for step in range(5)])


def tokens_of():
    return np.random.default_rng(3).integers(0, 64, (len(LENGTHS), 17), np.int32)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("knobs", KNOBS)
def test_a_cache_changes_nothing(knobs, side):
    """Faults: a token sees padding or empty slots; positions or windows count padding; a knob is ignored."""
    task = dataclasses.replace(SMALL, **KNOBS[knobs])
    variables, tokens = variables_of(task), tokens_of()
    found, expected = continued(task, variables, tokens, side), whole(task, variables, tokens)
    filled = np.array(LENGTHS) > 0
    assert_close(found[:, filled], expected[:, filled], 1e-5)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("knobs", ["plain", *(pytest.param(x, marks=pytest.mark.slow) for x in ("latents", "experts"))])
def test_a_mesh_changes_nothing(knobs):
    """Faults: rows or heads are mixed up on a mesh; the cache is replicated; it has keys of each head, not latents."""
    sizes, names = (
        ((2, 2, 2), ("data", "expert", "tensor"))
        if knobs == "experts"
        else ((2, 2, 2, 1), ("data", "fsdp", "tensor", "expert"))
    )
    task = dataclasses.replace(SMALL, **KNOBS[knobs])
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))
    variables, tokens = variables_of(task), tokens_of()
    rules = [*SPECS.items(), ("experts", "expert"), *((name, None) for name in ("kv", "layers", "norm"))]
    rules = [(name, axis if axis in names else None) for name, axis in rules]
    placements = placement.place_all(variables, task.logical_axes(variables), rules, mesh)
    sharded = jax.device_put(variables, placement.shardings(variables, placements, mesh))
    with jax.set_mesh(mesh):
        found = continued(task, sharded, tokens, "right")
        _, cache = prefill(task, sharded, *padded(tokens, "right"), SLOTS)
    filled = np.array(LENGTHS) > 0
    assert_close(found[:, filled], whole(task, variables, tokens)[:, filled], 1e-5)
    key = jax.tree.leaves(cache.layers["layers"])[0]
    width = task.latent_dim + task.rope_dim if task.latent_dim else task.head_dim
    assert key.sharding.shard_shape(key.shape) == (len(key), 2, SLOTS, 1, width)
    assert len(jax.tree.leaves(cache.layers["layers"])) == (1 if task.latent_dim else 2)
