"""Check the knobs of today's decoders against a NumPy reference."""

import dataclasses
import functools

import decoder_reference
import jax
import numpy as np
import pytest
from lm_cases import (
    LATENTS,
    SMALL,
    assert_close,
    batch_of,
    grad_of,
    logits_of,
    lower_on_mesh,
    quick_jit,
    spec_of,
    value_and_grad,
    variables_of,
)
from traced import dot_flops, equations

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
    "gemma 3": {
        "layers": 5,  # two repetitions of the pattern, and a rest
        "layer_pattern": ("local", "global"),
        "attention_window": 3,
        "local_rope_theta": 100.0,
        "rope_scaling": "linear factor=8",
        "qk_norm": "head",
    },
    "deepseek": LATENTS | {"norm_epsilon": 1e-2},  # not that of the latents
    "latents, with all else": LATENTS
    | {"query_latent_dim": 0, "value_dim": 0, "layer_pattern": ("local", "global"), "attention_window": 3}
    | {"local_rope_theta": 100.0, "rope_scaling": "", "attention_sinks": True, "attention_soft_cap": 0.5},
    "gpt-oss": {"layer_pattern": ("local", "global"), "attention_window": 3, "attention_sinks": True},
}
PATTERN_ON_MESH = KNOBS["gemma 3"] | {"layers": 2, "norms": "sandwich", "attention_sinks": True}
PATTERN_ON_MESH |= {"qk_norm": "all", "qkv_bias": True}
PATTERN = dataclasses.replace(SMALL, **KNOBS["gemma 3"], norms="sandwich", attention_sinks=True)


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


def test_a_pattern_goes_by_depth_also_behind_dense_layers():
    """Fault: the pattern begins again at the first layer with experts."""
    task = dataclasses.replace(PATTERN, experts=1, experts_per_token=1, dense_layers=1, attention_sinks=False)
    dense = dataclasses.replace(task, experts=0, dense_layers=0)
    params = variables_of(dense)["params"]
    first, rest = (jax.tree.map(lambda x, part=part: x[part], params["layers"]) for part in (slice(1), slice(1, None)))
    mlp = rest.pop("mlp")
    experts = {name: mlp[name]["kernel"][:, None] for name in mlp}
    routed = {**params, "dense_layers": first, "layers": rest | {"moe": experts | {"router": np.zeros((4, 32, 1))}}}
    batch = batch_of()
    found, expected = logits_of(task, {"params": routed}, batch), logits_of(dense, {"params": params}, batch)
    real = batch["segments"][:, :-1, None] > 0
    assert_close(found * real, expected * real, 1e-4)


def matmuls(task, batch, *, unrolled=False):
    abstract = jax.eval_shape(task.init, jax.random.key(0), spec_of(batch))
    jaxpr = jax.make_jaxpr(functools.partial(value_and_grad, task))(abstract, spec_of(batch)).jaxpr
    return [eqn for eqn in equations(jaxpr, unrolled=unrolled) if eqn.primitive.name == "dot_general"]


@pytest.mark.parametrize(("remat", "recomputed"), [("full", 9), ("best", 1)])
def test_remat_of_a_pattern(remat, recomputed):
    """Faults: remat does not reach the blocks of a pattern, or recomputes what a norm needs."""
    plain, batch = dataclasses.replace(PATTERN, layers=3), batch_of()
    task = dataclasses.replace(plain, remat=remat)
    if remat == "full":
        variables = variables_of(plain)
        assert_close(grad_of(plain, variables, batch), grad_of(task, variables, batch), 1e-6)
    more = len(matmuls(task, batch)) - len(matmuls(plain, batch))
    blocks = 3  # two of the pattern, one of the rest
    assert more in (recomputed * blocks, (recomputed - 1) * blocks)


def test_local_layers_compute_only_their_window():
    """Faults: local layers compute all T x T scores, or FLOPs count them."""
    task = dataclasses.replace(SMALL, layers=4, layer_pattern=("local", "global"), attention_window=32)
    batch, whole = batch_of([[1] * 1025]), dataclasses.replace(task, layer_pattern=("global",) * 2)
    fewer = sum(dot_flops(eqn) for eqn in matmuls(whole, batch, unrolled=True))
    fewer -= sum(dot_flops(eqn) for eqn in matmuls(task, batch, unrolled=True))
    scores = 12 * 1024 * 1024 * 32  # of a layer, by the formula of `square_flops`
    assert fewer > 0.75 * 2 * scores
    assert whole.flops(spec_of(batch)) - task.flops(spec_of(batch)) == 12 * 2 * 1024 * 32 * (512.5 - 31.515625)
    alone = dataclasses.replace(task, layer_pattern=(), layers=2)
    assert max(eqn.outvars[0].aval.size for eqn in matmuls(alone, batch)) < 1024 * 1024


@pytest.mark.parametrize(
    "knobs", [PATTERN_ON_MESH, pytest.param(LATENTS, marks=pytest.mark.slow)], ids=["all", "latents"]
)
def test_attention_on_a_mesh(knobs):
    """Faults: norms of all heads, or sinks, are computed of a device's heads; the stack is gathered; latents are cut
    like heads."""
    task = dataclasses.replace(SMALL, **knobs)
    batch, variables = batch_of(), variables_of(task)
    step, shardings, by_batch = lower_on_mesh(task, (2, 2, 2), batch)
    sharded = step(jax.device_put(variables, shardings), jax.device_put(batch, by_batch))
    assert_close(grad_of(task, variables, batch), jax.device_get(sharded), 1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_pattern": ("local", "full")}, r"layer_pattern=\('local', 'full'\): use any of local, global, or \(\)"),
        ({"layer_pattern": ("local", "global")}, "task.attention_window=0: local layers of task.layer_pattern need"),
        ({"local_rope_theta": 1e4}, "task.local_rope_theta=10000.0: task.layer_pattern has no local layers"),
        ({"value_dim": 4}, r"task.value_dim=4: only latent attention has it. Set task.latent_dim"),
        (LATENTS | {"rope_dim": 3}, "task.rope_dim=3: must be even and at least 2"),
        (LATENTS | {"kv_heads": 2}, "task.kv_heads=2: must be task.heads=4"),
        (LATENTS | {"qk_norm": "head"}, "task.qk_norm='head': must be '' with task.latent_dim"),
        ({"experts": 6, "router_groups": 4}, "task.router_groups=4: must split task.experts=6 into equal groups"),
        ({"experts": 8, "router_groups": 8}, "task.router_groups=8: must split task.experts=8 into equal groups"),
        ({"experts": 8, "groups_per_token": 2}, "task.groups_per_token=2: must be at most task.router_groups=1"),
        (
            {"experts": 8, "router_groups": 4, "experts_per_token": 3},
            "task.experts_per_token=3: must be at most the 2 experts of task.groups_per_token=1",
        ),
    ],
)
def test_options_are_checked_together(fields, message):
    """Faults: layers are all global though the user named local ones; an option does nothing; a token is sent to an
    expert outside its groups."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **fields)
