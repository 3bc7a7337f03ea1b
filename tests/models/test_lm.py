import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_cases import (
    LATENTS,
    SMALL,
    assert_close,
    batch_of,
    but_real_tokens,
    grad_of,
    logits_of,
    loss_of,
    lower_on_mesh,
    quick_jit,
    spec_of,
    value_and_grad,
    variables_of,
)
from traced import dot_flops, equations

from shampax.models.lm import LMTask


def test_causality():
    """Fault: a slot reads its own target or anything after it."""
    batch, variables = batch_of([[1] * 17] * 2), variables_of(SMALL)
    before = np.asarray(logits_of(SMALL, variables, batch))
    for slot in (3, 8, 15):
        tokens = batch["tokens"].copy()
        tokens[:, slot:] = (tokens[:, slot:] + 1) % 64
        after = np.asarray(logits_of(SMALL, variables, batch | {"tokens": tokens}))
        np.testing.assert_array_equal(before[:, :slot], after[:, :slot])
        assert (np.abs(before[:, slot:] - after[:, slot:]).max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("block", [0, 4])
def test_attention_stays_inside_a_document(block):
    """Fault: a document's predictions depend on the other documents of its row, or on padding."""
    batch, variables = batch_of(), variables_of(SMALL)
    task = dataclasses.replace(SMALL, attention_block=block)
    before = np.asarray(logits_of(task, variables, batch))
    for segment in (1, 2, 3, 0):
        others = batch["segments"] != segment
        tokens = np.where(others, (batch["tokens"] + 7) % 64, batch["tokens"])
        segments = np.where(others, 4 + np.arange(17) // 2, batch["segments"]).astype(np.int32)
        after = np.asarray(logits_of(task, variables, batch | {"tokens": tokens, "segments": segments}))
        kept = batch["segments"][:, :-1] == segment
        np.testing.assert_array_equal(before[kept], after[kept])


def test_only_counted_targets_have_a_loss():
    """Fault: fine-tuning learns questions, or divides by their number."""
    batch, variables = batch_of(), variables_of(SMALL)
    counted = (np.random.default_rng(2).random(batch["tokens"].shape) < 0.4).astype(np.int32)
    parts = []
    for mask in (counted, 1 - counted, np.ones_like(counted)):
        loss, (_, metrics) = loss_of(SMALL, variables, batch | {"counted": mask})
        total, targets = metrics["loss"]
        np.testing.assert_allclose(loss, total / targets, rtol=1e-6)
        parts.append((float(total), float(targets)))
    np.testing.assert_allclose(np.add(*parts[:2]), parts[2], rtol=1e-5)
    real = (batch["segments"][:, 1:] == batch["segments"][:, :-1]) & (batch["segments"][:, 1:] > 0)
    assert parts[0][1] == (real & (counted[:, 1:] > 0)).sum()


def test_a_window_limits_what_a_token_sees():
    """Faults: the window or the soft cap does not reach attention; FLOPs count keys outside the window."""
    variables, batch = variables_of(SMALL), batch_of([[1] * 17])
    changed = batch | {"tokens": (batch["tokens"] + (np.arange(17) == 0)) % 64}
    windowed, capped = (dataclasses.replace(SMALL, **x) for x in ({"attention_window": 2}, {"attention_soft_cap": 0.1}))
    before, after = (np.asarray(logits_of(windowed, variables, x))[0] for x in (batch, changed))
    # Two layers, each one slot back.
    assert (np.abs(before - after).max(axis=-1) > 1e-4).tolist() == [True] * 3 + [False] * 13
    assert np.abs(before - logits_of(SMALL, variables, batch)[0]).max() > 1e-2
    assert np.abs(logits_of(capped, variables, batch) - logits_of(SMALL, variables, batch)).max() > 1e-2
    # Of 16 tokens, the first sees one; without a window they see 8.5 on average.
    assert SMALL.flops(spec_of(batch)) - windowed.flops(spec_of(batch)) == 12 * 2 * (8.5 - 31 / 16) * 32 * 16


def test_a_packed_document_is_predicted_as_if_alone():
    """Fault: a document's predictions depend on its position in the row."""
    batch, variables = batch_of(), variables_of(SMALL)
    packed = np.asarray(logits_of(SMALL, variables, batch))[0, 4:11]
    alone = batch_of([[1] * 7 + [0] * 10])
    alone["tokens"][0, :7] = batch["tokens"][0, 4:11]
    assert_close(packed, np.asarray(logits_of(SMALL, variables, alone))[0, :7], 1e-5)


def test_rotary_positions_are_relative():
    """Fault: rotation depends on absolute positions, or is missing."""
    batch, variables = batch_of(), variables_of(SMALL)
    shifted = batch | {"positions": batch["positions"] + 100}
    stretched = batch | {"positions": batch["positions"] * 2}
    before = np.asarray(logits_of(SMALL, variables, batch))
    assert_close(before, logits_of(SMALL, variables, shifted), 1e-4)
    assert np.abs(before - logits_of(SMALL, variables, stretched)).max() > 0.01


def test_grouped_heads_equal_repeated_heads():
    """Fault: grouped queries read the wrong key-value head."""
    variables = variables_of(SMALL)
    full = jax.tree.map(lambda x: x, variables)
    for name in ("key", "value"):
        kernel = full["params"]["layers"]["attention"][name]["kernel"]
        full["params"]["layers"]["attention"][name]["kernel"] = np.repeat(kernel, 2, axis=2)
    multi_head = dataclasses.replace(SMALL, kv_heads=4)
    assert_close(logits_of(SMALL, variables, batch_of()), logits_of(multi_head, full, batch_of()), 1e-5)


@pytest.mark.parametrize(
    ("remat", "recomputed"),
    [("full", 9), ("dots", 2), ("minimal", 1), ("best", 1), ("context qkv", 4), ("context host:qkv", 4)],
)
def test_remat_changes_only_memory(remat, recomputed):
    """Faults: rematerialisation changes the loss or gradient; it uses another policy than configured."""
    task = dataclasses.replace(SMALL, remat=remat)
    variables, batch = variables_of(SMALL), batch_of()
    assert_close(grad_of(SMALL, variables, batch), grad_of(task, variables, batch), 1e-6)

    def matmuls(task):
        jaxpr = jax.make_jaxpr(functools.partial(value_and_grad, task))(variables, batch).jaxpr
        return sum(eqn.primitive.name == "dot_general" for eqn in equations(jaxpr))

    # All nine of a block, or only attention's two; the result of the last one is not needed.
    assert matmuls(task) - matmuls(SMALL) in (recomputed, recomputed - 1)


@pytest.mark.parametrize("tied_head", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_initial_loss_is_that_of_a_uniform_guess(tied_head):
    """Fault: the initial model is confident, for example by repeating its input."""
    task = dataclasses.replace(SMALL, vocab_size=2048, embed_dim=256, mlp_dim=512, tied_head=tied_head)
    batch = batch_of([[1] * 17] * 64, vocab_size=2048)
    variables = quick_jit(task.init)(jax.random.key(0), batch)
    repeating = batch | {"tokens": np.tile(np.arange(64)[:, None], 17)}
    for each in (batch, repeating):
        assert abs(loss_of(task, variables, each)[0] - math.log(2048)) < 0.2


def test_initial_scales():
    """Faults: folded or scanned kernels have the wrong fan-in; residual outputs are not scaled down; truncation is not
    corrected."""
    task = LMTask(
        vocab_size=512, layers=8, embed_dim=128, heads=8, kv_heads=4, head_dim=32, mlp_dim=256, tied_head=False
    )
    params = quick_jit(task.init)(jax.random.key(0), batch_of())["params"]
    params = jax.device_get(params)
    layers = params["layers"]
    fan_in = 128**-0.5
    expected = [
        (params["embedding"], 0.02),
        (params["head"], 0.02),
        (layers["attention"]["query"]["kernel"], fan_in),
        (layers["attention"]["value"]["kernel"], fan_in),
        (layers["attention"]["out"]["kernel"], 256**-0.5 / 4),
        (layers["mlp"]["up"]["kernel"], fan_in),
        (layers["mlp"]["down"]["kernel"], 256**-0.5 / 4),
    ]
    for kernel, std in expected:
        assert kernel.dtype == jnp.float32
        assert abs(kernel.std() / std - 1) < 0.03
    assert layers["attention"]["out"]["kernel"].shape == (8, 8, 32, 128)
    assert not np.array_equal(layers["mlp"]["up"]["kernel"][0], layers["mlp"]["up"]["kernel"][1])


def test_loss_and_metrics_by_hand():
    """Faults: targets across documents or in padding count; totals have wrong weights; held-out losses include the
    z-loss."""
    task = dataclasses.replace(SMALL, z_loss=0.01)
    variables, batch = variables_of(SMALL), batch_of()
    logits = np.asarray(logits_of(task, variables, batch), np.float64)
    logsumexp = np.log(np.exp(logits).sum(-1))
    nats = z = right = count = 0
    for row in range(4):
        for slot in range(16):
            segment = batch["segments"][row, slot]
            if segment == 0 or batch["segments"][row, slot + 1] != segment:
                continue
            target = batch["tokens"][row, slot + 1]
            nats += logsumexp[row, slot] - logits[row, slot, target]
            z += logsumexp[row, slot] ** 2
            right += logits[row, slot].argmax() == target
            count += 1
    for train, objective in ((True, nats + 0.01 * z), (False, nats)):
        loss, (model_state, metrics) = loss_of(task, variables, batch, train)
        assert model_state == {}
        expected = {
            "loss": (objective, count),
            "bits_per_byte": (nats / math.log(2), batch["bytes"].sum()),
            "accuracy": (right, count),
            "z_loss": (z, count),
        }
        if train:
            expected["real_tokens"] = (np.sum(batch["segments"][:, 1:] > 0), batch["segments"][:, 1:].size)
        assert_close(metrics, expected, 1e-4)
        assert_close(loss, objective / count, 1e-4)


def test_padding_has_no_weight_and_no_gradient():
    """Fault: padding rows give NaN, which the guard counts as a diverged step."""
    variables, padding = variables_of(SMALL), jax.tree.map(np.zeros_like, batch_of())
    loss, gradient = grad_of(SMALL, variables, padding)
    assert loss == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    batch = batch_of()
    padded = jax.tree.map(lambda x, zeros: np.concatenate([x, zeros]), batch, padding)
    assert_close(*(but_real_tokens(loss_of(SMALL, variables, x)) for x in (batch, padded)), 1e-6)


def test_types_of_parameters_logits_and_matmuls():
    """Faults: parameters, logits or softmax are bfloat16; matmuls are float32."""
    task = dataclasses.replace(SMALL, compute_dtype="bfloat16", tied_head=False)
    single = dataclasses.replace(task, compute_dtype="float32")
    variables, batch = variables_of(task), batch_of()
    half, full = (np.asarray(logits_of(each, variables, batch)) for each in (task, single))
    assert half.dtype == jnp.float32
    error = np.abs(half - full).mean() / np.abs(full).mean()
    assert 1e-5 < error < 0.05
    gradient = jax.eval_shape(functools.partial(value_and_grad, task), variables, batch)[1]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
    abstract = jax.eval_shape(task.init, jax.random.key(0), spec_of(batch))
    jaxpr = jax.make_jaxpr(task.logits)(abstract, batch)
    dots = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert {var.aval.dtype for eqn in dots for var in eqn.invars} == {jnp.dtype("bfloat16")}
    exponentials = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "exp"]
    assert {eqn.outvars[0].aval.dtype for eqn in exponentials} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "options", [{}, {"kv_heads": 4, "tied_head": False}, LATENTS, LATENTS | {"query_latent_dim": 0, "value_dim": 0}]
)
def test_flops_match_the_traced_matmuls(options):
    """Count every matmul of loss and gradient. Fault: the formula lacks a term or counts it twice."""
    task = dataclasses.replace(SMALL, **options)
    batch = batch_of()
    abstract = jax.eval_shape(task.init, jax.random.key(0), spec_of(batch))
    jaxpr = jax.make_jaxpr(functools.partial(value_and_grad, task))(abstract, batch).jaxpr
    dots = (eqn for eqn in equations(jaxpr, unrolled=True) if eqn.primitive.name == "dot_general")
    assert task.square_flops(spec_of(batch)) == sum(map(dot_flops, dots))
    rows, length = batch["tokens"].shape
    hidden = sum(range(length - 1))  # pairs above the diagonal
    pairs = 6 * task.layers * task.heads * (task.score_width + task.value_width) * rows * hidden
    assert task.flops(spec_of(batch)) == task.square_flops(spec_of(batch)) - pairs


@pytest.mark.parametrize("options", [{}, {"tied_head": False}])
def test_logical_axes_name_every_dimension(options):
    """Faults: axes do not fit the arrays; boxes remain in the tree; no rule has a name."""
    task = dataclasses.replace(SMALL, **options)
    variables = jax.eval_shape(task.init, jax.random.key(0), spec_of(batch_of()))
    axes = task.logical_axes(variables)
    sizes = {"embed": 32, "mlp": 48, "heads": 4, "kv_heads": 2, "kv": 8, "vocab": 64, "layers": 2, "norm": None}

    def check(array, names):
        assert type(array) is jax.ShapeDtypeStruct
        assert len(names) == array.ndim
        for name, size in zip(names, array.shape, strict=True):
            assert sizes[name] in (size, None)

    assert type(variables) is type(axes) is dict
    jax.tree.map(check, variables, axes)
    with pytest.raises(ValueError, match=r"structure|Dict"):
        task.logical_axes({"params": {"other": variables["params"]["embedding"]}})


def test_sharded_equals_single():
    """Faults: constraints change the result on a mesh; a table lookup reshuffles activations."""
    batch, variables = batch_of(), variables_of(SMALL)
    step, shardings, by_batch = lower_on_mesh(SMALL, (2, 2, 2), batch)
    assert not re.search("all-to-all|collective-permute", step.as_text())
    sharded = step(jax.device_put(variables, shardings), jax.device_put(batch, by_batch))
    assert_close(grad_of(SMALL, variables, batch), jax.device_get(sharded), 1e-4)


def test_fsdp_moves_weights_but_not_activations():
    """Fault: without constraints, the partitioner all-reduces activations, which are many times larger than the
    weights."""
    task = dataclasses.replace(SMALL, layers=1)  # so that the scanned body is counted in full
    batch = batch_of([[1] * 129] * 32)
    step, _, _ = lower_on_mesh(task, (1, 8, 1), batch)
    moved = 0
    for shapes in re.findall(
        r"= (.*?) (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", step.as_text()
    ):
        moved += sum(math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", shapes))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables_of(task)))
    activations = 32 * 128 * 32
    assert activations > 4 * parameters
    # Each weight is gathered forward and backward, its gradient reduced once; the tied table has two uses.
    assert moved < 5 * parameters


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 4, "kv_heads": 3}, "kv_heads=3: must divide task.heads=4"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"remat": "some"}, "'some': use one of none, full, dots, minimal, best, or names of qkv context"),
        ({"remat": "context wrong"}, "'context wrong': use one of none"),
        ({"remat": "qkv host:qkv"}, "'qkv host:qkv': use one of none"),
        ({"attention": "flash"}, "task.attention='flash': use one of auto, xla, splash, cudnn"),
        ({"compute_dtype": "float16"}, "'float16'"),
        ({"layers": 0}, "layers=0"),
        ({"z_loss": -1.0}, "z_loss=-1.0: must be at least 0"),
        ({"z_loss": math.nan}, "z_loss=nan"),
        ({"qk_norm": "heads"}, "task.qk_norm='heads': use one of '', head, all"),
        ({"norms": ""}, "task.norms='': use one of pre, post, sandwich"),
        ({"embedding_scale": 0.0}, "embedding_scale=0.0: must be above 0"),
    ],
)
def test_fields_are_checked(fields, message):
    """Fault: an invalid value is accepted at construction and fails inside a trace."""
    with pytest.raises(ValueError, match=message):
        LMTask(**fields)


def test_a_batch_without_tokens_is_refused():
    """Fault: data for another kind of model give a KeyError inside a trace."""
    with pytest.raises(ValueError, match=r"\['image'\] and no 'tokens'"):
        SMALL.init(jax.random.key(0), {"image": jax.ShapeDtypeStruct((2, 2), jnp.int32)})
