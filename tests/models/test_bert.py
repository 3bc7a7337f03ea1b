import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from traced import dot_flops, equations, quick_jit

from shampax.models.bert import BertTask

SMALL = BertTask(vocab_size=48, max_length=20, layers=2, embed_dim=16, heads=2, mlp_dim=24, dropout=0.0)
# First texts, second texts and padding; the last row fills up a batch.
SEGMENTS = [[1] * 5 + [2] * 11, [1] * 3 + [2] * 6 + [0] * 7, [1] * 12 + [2] * 4, [0] * 16]
POSITIONS = [[2, 7, 13], [4, 0, 0], [1, 5, 14], [0, 0, 0]]


def batch_of(segments=SEGMENTS, positions=POSITIONS, seed=0):
    random = np.random.default_rng(seed)
    segments, positions = np.array(segments, np.int32), np.array(positions, np.int32)
    real = segments[:, 0] > 0
    return {
        "tokens": np.where(segments > 0, random.integers(5, 48, segments.shape), 0).astype(np.int32),
        "segments": segments,
        "masked_positions": positions,
        "masked_tokens": np.where(positions > 0, random.integers(5, 48, positions.shape), 0).astype(np.int32),
        "is_next": np.where(real, random.integers(0, 2, len(segments)), 0).astype(np.int32),
    }


def spec_of(batch):
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}


@functools.cache
def variables_of(task):
    """Return random parameters, all of them large enough to matter."""
    random = np.random.default_rng(1)
    abstract = jax.eval_shape(task.init, jax.random.key(0), spec_of(batch_of()))
    return jax.tree.map(lambda x: random.normal(0.1, 0.3, x.shape).astype(np.float32), abstract)


@functools.partial(quick_jit, static_argnums=0)
def logits_of(task, variables, batch):
    return task.logits(variables, batch)


def loss_and_metrics(task, variables, batch):
    return jax.value_and_grad(lambda v: task.loss(v, batch, key=jax.random.key(0), train=True), has_aux=True)(variables)


grad_of = quick_jit(loss_and_metrics, static_argnums=0)


def assert_close(left, right, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), left, right)


def test_attention_reads_exactly_the_real_slots():
    """Faults: attention only looks back, reads padding, or mixes rows."""
    batch, variables = batch_of(), variables_of(SMALL)
    masked, relation = map(np.asarray, logits_of(SMALL, variables, batch))
    for slot in (0, 15):
        tokens = batch["tokens"].copy()
        tokens[0, slot] = (tokens[0, slot] + 9) % 48
        changed, other = map(np.asarray, logits_of(SMALL, variables, batch | {"tokens": tokens}))
        assert (np.abs(changed - masked)[0].max(axis=-1) > 1e-3).all()
        assert np.abs(other - relation)[0].max() > 1e-4
        np.testing.assert_array_equal(changed[1:], masked[1:])
    tokens = np.where(batch["segments"] > 0, batch["tokens"], 7)
    padded, other = map(np.asarray, logits_of(SMALL, variables, batch | {"tokens": tokens}))
    np.testing.assert_array_equal(padded[:3], masked[:3])
    np.testing.assert_array_equal(other[:3], relation[:3])
    shorter = {name: batch[name][1:2, :9] for name in ("tokens", "segments")}
    alone = logits_of(SMALL, variables, {name: batch[name][1:2] for name in batch} | shorter)
    assert_close([masked[1:2], relation[1:2]], list(alone), 1e-5)


def test_positions_and_token_types_change_predictions():
    """Fault: a table of positions or token types is not used, or with a wrong index."""
    batch, variables = batch_of(), variables_of(SMALL)
    masked, _ = map(np.asarray, logits_of(SMALL, variables, batch))
    by_hand = variables["params"]["embeddings"]
    for name, used in (("positions", 16), ("types", 2)):
        for row in range(len(by_hand[name])):
            moved = jax.tree.map(np.copy, variables)
            moved["params"]["embeddings"][name][row] += 1.0 + np.arange(16) % 3
            changed = np.abs(np.asarray(logits_of(SMALL, moved, batch)[0]) - masked).max() > 1e-4
            assert changed == (row < used), (name, row)


def test_only_masked_slots_are_predicted():
    """Faults: a prediction is of another slot than the masked one; an unused prediction slot has weight."""
    batch, variables = batch_of(), variables_of(SMALL)
    masked, _ = map(np.asarray, logits_of(SMALL, variables, batch))
    order = np.array([2, 0, 1])
    permuted, _ = logits_of(SMALL, variables, batch | {"masked_positions": batch["masked_positions"][:, order]})
    assert_close(masked[:, order], permuted, 1e-5)
    (loss, (_, metrics)), _ = grad_of(SMALL, variables, batch)
    assert float(metrics["masked_loss"][1]) == 7
    free = np.where(batch["masked_positions"] > 0, batch["masked_tokens"], 9).astype(np.int32)
    assert grad_of(SMALL, variables, batch | {"masked_tokens": free})[0][0] == loss


def test_loss_and_metrics_by_hand():
    """Faults: totals have wrong weights; a loss is not its total divided by its weight."""
    batch, variables = batch_of(), variables_of(SMALL)
    masked, relation = (np.asarray(x, np.float64) for x in logits_of(SMALL, variables, batch))

    def nats(logits, target):
        return math.log(np.exp(logits).sum()) - logits[target]

    of_masked, right, of_rows, followed = 0.0, 0, 0.0, 0
    for row in range(3):
        of_rows += nats(relation[row], batch["is_next"][row])
        followed += relation[row].argmax() == batch["is_next"][row]
        for place in np.flatnonzero(batch["masked_positions"][row]):
            of_masked += nats(masked[row, place], batch["masked_tokens"][row, place])
            right += masked[row, place].argmax() == batch["masked_tokens"][row, place]
    (loss, (model_state, metrics)), _ = grad_of(SMALL, variables, batch)
    expected = {
        "loss": (of_masked / 3 + of_rows, 3),
        "masked_loss": (of_masked, 7),
        "masked_accuracy": (right, 7),
        "next_sentence_accuracy": (followed, 3),
        "real_tokens": ((batch["segments"] > 0).sum(), batch["segments"].size),
    }
    assert model_state == {}
    assert_close(dict(metrics), expected, 1e-4)
    assert_close(loss, expected["loss"][0] / 3, 1e-4)


def test_micro_batches_add_up():
    """Fault: the loss is normalised over the batch, so that gradient accumulation changes the gradient."""
    batch, variables = batch_of(), variables_of(SMALL)
    (_, (_, whole)), gradient = grad_of(SMALL, variables, batch)
    parts = [grad_of(SMALL, variables, {name: x[half::2] for name, x in batch.items()}) for half in range(2)]
    weights = [float(metrics["loss"][1]) for (_, (_, metrics)), _ in parts]
    assert weights == [2, 1]
    summed = jax.tree.map(lambda x, y: (weights[0] * x + weights[1] * y) / 3, parts[0][1], parts[1][1])
    assert_close(gradient, summed, 1e-4)
    totals = jax.tree.map(lambda x, y: x + y, parts[0][0][1][1], parts[1][0][1][1])
    assert_close(whole, totals, 1e-4)


def test_padding_has_no_weight_and_no_gradient():
    """Fault: padding rows give NaN, which the guard counts as a diverged step."""
    empty = jax.tree.map(np.zeros_like, batch_of())
    (loss, _), gradient = grad_of(SMALL, variables_of(SMALL), empty)
    assert loss == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_each_loss_has_gradients_for_its_parameters():
    """Faults: the decoder is not tied to the word table; is_next does not train the pooler."""
    batch, variables = batch_of(), variables_of(SMALL)
    _, gradient = grad_of(SMALL, variables, batch)
    gradient = gradient["params"]
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(gradient["next_head"]))
    unmasked = batch | {"masked_positions": np.zeros_like(batch["masked_positions"])}
    _, of_pairs = grad_of(SMALL, variables, unmasked)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(of_pairs["params"]["masked_head"]))
    assert np.abs(of_pairs["params"]["layers"]["mlp"]["up"]["kernel"]).max() > 1e-4
    # Words that are not in the batch get gradients only as candidates for masked slots.
    absent = np.setdiff1d(np.arange(48), batch["tokens"])
    assert (np.abs(gradient["embeddings"]["words"])[absent].max(axis=-1) > 1e-5).all()
    assert (of_pairs["params"]["embeddings"]["words"][absent] == 0).all()
    assert set(gradient["masked_head"]) == {"dense", "norm", "bias"}


def test_dropout_is_only_in_training_and_depends_on_the_key():
    """Faults: held-out metrics depend on a key; dropout has no effect; it is equal in all layers or steps."""
    task = dataclasses.replace(SMALL, dropout=0.5, layers=1)
    batch, variables = batch_of(), variables_of(task)

    @quick_jit
    def losses(keys):
        return [task.loss(variables, batch, key=key, train=train)[0] for key in keys for train in (True, False)]

    first, judged, second, again = losses(list(jax.random.split(jax.random.key(0), 2)))
    assert judged == again
    assert len({float(first), float(second), float(judged)}) == 3


def test_flops_match_the_traced_matmuls():
    """Count every matmul of loss and gradient. Fault: the formula lacks a term or counts it twice."""
    batch = batch_of()
    abstract = jax.eval_shape(SMALL.init, jax.random.key(0), spec_of(batch))
    jaxpr = jax.make_jaxpr(functools.partial(loss_and_metrics, SMALL))(abstract, batch).jaxpr
    dots = (eqn for eqn in equations(jaxpr, unrolled=True) if eqn.primitive.name == "dot_general")
    assert SMALL.flops(spec_of(batch)) == sum(map(dot_flops, dots))


def test_golden_values():
    """Faults: an unintended change of initialisation or model; initial predictions are confident."""
    task = dataclasses.replace(SMALL, init_std=0.02)
    (loss, (_, metrics)), gradient = grad_of(task, quick_jit(task.init)(jax.random.key(0), batch_of()), batch_of())
    norm = math.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradient)))
    masked = float(metrics["masked_loss"][0] / 7)
    assert abs(masked - math.log(48)) < 0.1
    np.testing.assert_allclose([float(loss), masked, norm], [3.703146, 3.874597, 2.249017], rtol=2e-3)


def test_initial_scales():
    """Faults: kernels have another initial scale than configured; scanned layers are initialised equally."""
    task = dataclasses.replace(SMALL, embed_dim=64, mlp_dim=128, vocab_size=512, init_std=0.05)
    params = jax.device_get(quick_jit(task.init)(jax.random.key(0), batch_of()))["params"]
    up = params["layers"]["mlp"]["up"]["kernel"]
    for kernel in (params["embeddings"]["words"], up, params["layers"]["attention"]["out"]["kernel"]):
        assert kernel.dtype == jnp.float32
        assert np.abs(kernel).max() <= 0.1
        # A normal distribution truncated at two standard deviations.
        assert abs(kernel.std() / (0.05 * 0.8796) - 1) < 0.03
    assert not np.array_equal(up[0], up[1])


def test_initial_sinusoidal_positions():
    """Faults: sines are of other positions; the scale differs from that of words."""
    task = dataclasses.replace(SMALL, position_init="sinusoidal", init_std=0.1, layers=1)
    table = quick_jit(task.init)(jax.random.key(0), batch_of())["params"]["embeddings"]["positions"]
    frequencies = 20.0 ** -(np.arange(0, 16, 2) / 16)
    angles = np.arange(20)[:, None] * frequencies
    expected = 0.1 * np.sqrt(2) * np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(20, 16)
    np.testing.assert_allclose(table, expected, atol=1e-5)


def test_types_of_logits_norms_and_matmuls():
    """Faults: logits or norms are bfloat16; matmuls are float32."""
    task = dataclasses.replace(SMALL, compute_dtype="bfloat16")
    batch = batch_of()
    abstract = jax.eval_shape(task.init, jax.random.key(0), spec_of(batch))
    jaxpr = jax.make_jaxpr(task.logits)(abstract, batch)
    assert {var.aval.dtype for var in jaxpr.jaxpr.outvars} == {jnp.dtype("float32")}
    found = list(equations(jaxpr.jaxpr))
    dots = [eqn for eqn in found if eqn.primitive.name == "dot_general"]
    assert {var.aval.dtype for eqn in dots for var in eqn.invars} == {jnp.dtype("bfloat16")}
    roots = [eqn for eqn in found if eqn.primitive.name in ("rsqrt", "exp")]
    assert {eqn.outvars[0].aval.dtype for eqn in roots} == {jnp.dtype("float32")}


def test_logical_axes_name_every_dimension():
    """Faults: axes do not fit the arrays; boxes remain in the tree; no rule has a name."""
    variables = jax.eval_shape(SMALL.init, jax.random.key(0), spec_of(batch_of()))
    axes = SMALL.logical_axes(variables)
    sizes = {"embed": (16,), "mlp": (24, 16), "heads": (2,), "kv": (8,), "vocab": (48,), "layers": (2,), "norm": (16,)}

    def check(array, names):
        assert type(array) is jax.ShapeDtypeStruct
        assert len(names) == array.ndim
        for name, size in zip(names, array.shape, strict=True):
            assert name is None or size in sizes[name]

    jax.tree.map(check, variables, axes)


SPECS = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor", "vocab": "tensor"}


def test_sharded_equals_single():
    """Faults: constraints change the result on a mesh; masked slots are gathered across devices."""
    batch, variables = batch_of(), variables_of(SMALL)
    mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    shardings = jax.tree.map(
        lambda _, names: NamedSharding(mesh, P(*(SPECS.get(name) for name in names))),
        variables,
        SMALL.logical_axes(variables),
    )
    by_batch = NamedSharding(mesh, P(("data", "fsdp")))
    step = quick_jit(
        lambda v, b: loss_and_metrics(SMALL, v, b),
        in_shardings=(shardings, by_batch),
        out_shardings=((NamedSharding(mesh, P()), NamedSharding(mesh, P())), shardings),
    )
    with jax.set_mesh(mesh):
        compiled = step.lower(spec_of_tree(variables), spec_of(batch)).compile()
    shuffles = [
        line for line in compiled.as_text().splitlines() if re.search(r"all-to-all\(|collective-permute\(", line)
    ]
    assert not [line for line in shuffles if "next_head" not in line]  # at most a slot of each row
    sharded = compiled(jax.device_put(variables, shardings), jax.device_put(batch, by_batch))
    assert_close(grad_of(SMALL, variables, batch), jax.device_get(sharded), 1e-4)


def spec_of_tree(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3}, "embed_dim=16: must be divisible by task.heads=3; use 15"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"init_std": 0.0}, "init_std=0.0"),
        ({"position_init": "rotary"}, "'rotary': use one of normal, sinusoidal"),
        ({"remat": "some"}, "'some': use one of none, full, dots"),
        ({"compute_dtype": "float16"}, "'float16'"),
        ({"layers": 0}, "layers=0"),
    ],
)
def test_fields_are_checked(fields, message):
    """Fault: an invalid value is accepted at construction and fails inside a trace."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **fields)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"tokens": jax.ShapeDtypeStruct((2, 17), jnp.int32)}, "no 'masked_positions'"),
        (
            spec_of(batch_of()) | {"tokens": jax.ShapeDtypeStruct((2, 21), jnp.int32)},
            "max_length=20: rows have 21 tokens; set it to 21",
        ),
    ],
)
def test_batches_of_other_data_are_refused(batch, message):
    """Faults: data of another kind give a KeyError inside a trace; positions beyond the table read its last entry."""
    with pytest.raises(ValueError, match=message):
        SMALL.init(jax.random.key(0), batch)
