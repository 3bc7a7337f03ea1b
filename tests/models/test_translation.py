import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sacrebleu
from jax.extend import core
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from shampax.models.encoder_decoder import Transformer
from shampax.models.translation import TranslationTask

SMALL = TranslationTask(
    vocab_size=24,
    encoder_layers=2,
    decoder_layers=3,
    embed_dim=16,
    heads=2,
    head_dim=4,
    mlp_dim=24,
    beam_size=3,
    decode_length=6,
)
SOURCES = [[4, 3], [7], [2, 2, 2], [5, 1]]  # source tokens of each pair of a row, including ends
TARGETS = [[3, 5], [6], [3, 2, 4], [2, 5]]  # target slots of each pair of a row
# Programs are small and run once: they compile in a third of the time without LLVM's optimisations.
quick_jit = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)


def batch_of(sources=SOURCES, targets=TARGETS, source_length=8, target_length=9, seed=0):
    """Return random tokens with segments and positions of pairs of the given lengths."""
    random = np.random.default_rng(seed)
    batch = {}
    for side, rows, length in (("source", sources, source_length), ("target", targets, target_length + 1)):
        segments, positions = (np.zeros((len(rows), length), np.int32) for _ in range(2))
        for row, sizes in enumerate(rows):
            filled = [(number, place) for number, size in enumerate(sizes, start=1) for place in range(size)]
            segments[row, : len(filled)], positions[row, : len(filled)] = np.transpose(filled)
        tokens = np.where(segments > 0, random.integers(1, 24, segments.shape), 0).astype(np.int32)
        batch |= {side: tokens, f"{side}_segments": segments, f"{side}_positions": positions}
    return batch


def spec_of(batch):
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}


@functools.cache
def variables_of(task=SMALL):
    """Return parameters drawn by NumPy, large enough that everything matters."""
    random = np.random.default_rng(1)
    abstract = jax.eval_shape(task.init, jax.random.key(0), spec_of(batch_of()))
    return jax.tree.map(lambda x: random.normal(0.1, 0.3, x.shape).astype(np.float32), abstract)


@functools.partial(quick_jit, static_argnums=0)
def logits_of(task, variables, batch):
    return task.logits(variables, batch)


@functools.partial(quick_jit, static_argnums=(0, 4))
def loss_of(task, variables, batch, seed=0, train=False):
    return task.loss(variables, batch, key=jax.random.key(seed), train=train)


def loss_and_gradient(task, variables, batch):
    return jax.value_and_grad(lambda v: task.loss(v, batch, key=jax.random.key(0), train=True)[0])(variables)


# Without dropout, all gradients share one program.
STILL = dataclasses.replace(SMALL, dropout=0.0)
gradient_of = quick_jit(functools.partial(loss_and_gradient, STILL))


def assert_close(left, right, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), left, right)


@pytest.fixture(scope="module")
def before():
    """Return logits of the small model on the usual batch."""
    return np.asarray(logits_of(SMALL, variables_of(), batch_of()))


def changed(batch, name, where, by=5):
    return batch | {name: np.where(where, (batch[name] + by) % 24, batch[name]).astype(np.int32)}


def test_later_targets_are_masked(before):
    """Fault: a slot reads its own target or anything after it."""
    batch = batch_of()
    after = np.asarray(logits_of(SMALL, variables_of(), changed(batch, "target", np.arange(10) >= 4)))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    inside = batch["target_segments"][:, 4] > 0
    assert (np.abs(before - after)[inside, 4].max(axis=-1) > 1e-3).all()


def test_pairs_of_a_row_are_masked_from_each_other(before):
    """Fault: attention crosses pairs, on either side or between the sides, or reads padding."""
    batch, variables = batch_of(), variables_of()
    for segment in (0, 1, 2, 3):
        others = batch
        for side in ("source", "target"):
            others = changed(others, side, batch[f"{side}_segments"] != segment)
        after = np.asarray(logits_of(SMALL, variables, others))
        kept = (batch["target_segments"][:, :-1] == segment) & (segment > 0)
        np.testing.assert_array_equal(before[kept], after[kept])


def test_a_packed_pair_is_predicted_as_if_alone(before):
    """Fault: predictions depend on a pair's position in the row, or on padding after it."""
    batch = batch_of()
    alone = batch_of([[3]], [[5]], source_length=5, target_length=7)
    alone["source"][0, :3], alone["target"][0, :5] = batch["source"][0, 4:7], batch["target"][0, 3:8]
    assert_close(before[0, 3:8], np.asarray(logits_of(SMALL, variables_of(), alone))[0, :5], 1e-5)


def test_every_source_token_and_its_position_matter(before):
    """Faults: the encoder is not connected; without positions, the order of tokens does not matter."""
    batch, variables = batch_of(), variables_of()
    for place in range(7):
        after = np.asarray(logits_of(SMALL, variables, changed(batch, "source", np.arange(8) == place)))
        assert (np.abs(before - after)[1, :6].max(axis=-1) > 1e-4).all()
    order = [3, 1, 2, 0, 4, 5, 6, 7]
    after = np.asarray(logits_of(SMALL, variables, batch | {"source": batch["source"][:, order]}))
    assert (np.abs(before - after)[1, :6].max(axis=-1) > 1e-4).all()


def test_loss_and_metrics_by_hand(before):
    """Faults: held-out losses include label smoothing; a target of another pair or of padding counts; weights are
    wrong."""
    batch, variables = batch_of(), variables_of()
    logits = before.astype(np.float64)
    nats = spread = right = count = 0.0
    for row in range(4):
        for slot in range(9):
            segment = batch["target_segments"][row, slot + 1]
            if segment == 0 or segment != batch["target_segments"][row, slot]:
                continue
            log_probs = logits[row, slot] - np.log(np.exp(logits[row, slot]).sum())
            target = batch["target"][row, slot + 1]
            nats, spread = nats - log_probs[target], spread - log_probs.mean()
            right, count = right + (log_probs.argmax() == target), count + 1
    assert count == sum(size - 1 for sizes in TARGETS for size in sizes)
    assert_close(gradient_of(variables, batch)[0], (0.9 * nats + 0.1 * spread) / count, 1e-4)
    for seed, objective in ((0, nats), (1, nats)):
        loss, (model_state, metrics) = loss_of(SMALL, variables, batch, seed)
        assert model_state == {}
        expected = {"loss": (objective, count), "nats_per_token": (nats, count), "accuracy": (right, count)}
        assert_close(metrics, expected, 1e-4)
        assert_close(loss, objective / count, 1e-4)


def test_dropout_depends_on_the_key_and_is_only_in_training():
    """Faults: held-out examples are evaluated with dropout; the same units are dropped at every step."""
    batch, variables = batch_of(), variables_of()
    losses = [float(loss_of(SMALL, variables, batch, seed, True)[0]) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert float(loss_of(SMALL, variables, batch, 0)[0]) == float(loss_of(SMALL, variables, batch, 1)[0])


def test_examples_of_zeros_have_no_weight_and_no_gradient():
    """Fault: padding rows give NaN, which the guard counts as a diverged step."""
    variables, padding = variables_of(), jax.tree.map(np.zeros_like, batch_of())
    loss, gradient = gradient_of(variables, padding)
    assert loss == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    assert loss_of(SMALL, variables, padding)[1][1]["nats_per_token"][1] == 0


def test_gradient_against_finite_differences():
    """Fault: gradients do not reach a part of the model, such as the encoder through the source's keys."""
    batch, variables = batch_of(), variables_of()
    _, gradient = gradient_of(variables, batch)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient))
    random = np.random.default_rng(3)
    for part in variables["params"]:
        if part.endswith("norm"):
            continue
        way = jax.tree.map(lambda x: np.sign(random.normal(size=x.shape)).astype(np.float32), variables["params"][part])
        ends = []
        for step in (1e-3, -1e-3):
            moved = jax.tree.map(lambda x, d: x + step * d, variables["params"][part], way)
            there = {"params": variables["params"] | {part: moved}}
            ends.append(float(gradient_of(there, batch)[0]))
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float((g * d).sum()), gradient["params"][part], way)))
        assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(slope, rel=0.03, abs=0.03)


def test_cached_decoding_gives_the_logits_of_the_whole_row():
    """Fault: the cache has the keys of another hypothesis or position, or rotates them wrongly."""
    beams, slots = 3, SMALL.decode_length
    batch, variables, model = batch_of([[7], [5]], [[7], [7]]), variables_of(), Transformer(SMALL, train=False)
    random = np.random.default_rng(4)
    parents = random.integers(0, beams, (slots, 2, beams))
    tokens = random.integers(0, 24, (slots, 2, beams))

    @quick_jit
    def run():
        memory = model.apply(variables, batch["source"], batch["source_segments"], method="memory")
        empty = jnp.zeros((3, 2, beams, slots, 2, 4))

        def step(cache, at):
            position, parents, tokens = at
            inputs = (tokens, parents, position, cache, memory, batch["source_segments"])
            logits, cache = model.apply(variables, *inputs, method="step")
            return cache, logits

        return jax.lax.scan(step, (empty, empty), (jnp.arange(slots), parents, tokens))[1]

    found = np.asarray(run())
    histories = [[[] for _ in range(beams)] for _ in range(2)]
    for position in range(slots):
        for row in range(2):
            old = histories[row]
            histories[row] = [[*old[parents[position, row, k]], int(tokens[position, row, k])] for k in range(beams)]
    for k in range(beams):
        rows = batch_of([[7], [5]], [[7], [7]], target_length=6) | {
            name: batch[name] for name in batch if name.startswith("source")
        }
        rows["target"][:, :6] = [histories[row][k] for row in range(2)]
        whole = np.asarray(logits_of(SMALL, variables, rows))
        assert_close(whole[:, 5], found[5, :, k], 2e-4)
    first = np.asarray(
        logits_of(SMALL, variables, rows | {"target": np.repeat(tokens[0, :, :1], 7, axis=1).astype(np.int32)})
    )
    assert_close(first[:, 0], found[0, :, 0], 2e-4)


@functools.cache
def translated():
    """Return translations of 4 sources by the small model on one device."""
    batch = batch_of([[size] for size in (7, 5, 2, 8)], [[4]] * 4)
    return batch, quick_jit(SMALL.translate)(variables_of(), batch["source"], batch["source_segments"])


def test_the_score_of_a_translation_is_the_sum_over_its_tokens():
    """Fault: the search starts with another token, ends elsewhere, or reads the source differently from training."""
    batch, found = translated()
    rows = batch | {"target": np.zeros((4, 10), np.int32), "target_segments": np.ones((4, 10), np.int32)}
    rows["target_positions"] = np.tile(np.arange(10, dtype=np.int32), (4, 1))
    rows["target"][:, 1 : SMALL.decode_length + 1] = found.tokens
    logits = np.asarray(logits_of(SMALL, variables_of(), rows), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for row, tokens in enumerate(found.tokens.tolist()):
        assert (0 in tokens) == found.finished[row]
        size = tokens.index(0) + 1 if 0 in tokens else len(tokens)
        score = log_probs[row, np.arange(size), tokens[:size]].sum() / ((5 + size) / 6) ** SMALL.length_penalty
        np.testing.assert_allclose(found.scores[row], score, rtol=1e-3)


SPECS = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor", "vocab": "tensor"}


def test_sharded_equals_single():
    """Fault: constraints or rematerialisation change loss, gradient or translations on a mesh."""
    batch, single = translated()
    task, variables = dataclasses.replace(STILL, remat="full"), variables_of()
    mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=jax.devices()[:4])
    shardings = jax.tree.map(
        lambda _, names: NamedSharding(mesh, P(*(SPECS.get(name) for name in names))),
        variables,
        task.logical_axes(variables),
    )
    placed = jax.device_put((variables, batch), (shardings, NamedSharding(mesh, P(("data", "fsdp")))))
    with jax.set_mesh(mesh):
        both = quick_jit(lambda v, b: (loss_and_gradient(task, v, b), task.predict(v, b)))(*placed)
    assert_close(jax.device_get(both[0]), gradient_of(variables, batch), 2e-4)
    np.testing.assert_array_equal(both[1]["translation"], single.tokens)
    np.testing.assert_array_equal(both[1]["reference"], batch["target"][:, 1:])


def test_judged_by_sacrebleu():
    """Faults: BLEU is of tokens instead of text; sides are swapped; tokens after the end count as text."""
    words = ["", *"abcdefghij"]

    def decode(tokens):
        return " ".join(words[token] for token in tokens.tolist() if token)

    translation = np.array([[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 10, 1], [1, 0, 0, 0, 0, 0]])
    reference = np.array([[1, 2, 3, 4, 6, 0, 0], [6, 7, 8, 9, 10, 0, 0], [1, 2, 0, 0, 0, 0, 0]])
    values, line = SMALL.judge({"translation": translation, "reference": reference}, decode)
    expected = sacrebleu.corpus_bleu([decode(row) for row in translation], [[decode(row) for row in reference]])
    assert values == {"bleu": expected.score}
    assert 0 < expected.score < 100
    assert "tok:13a" in line and f"version:{sacrebleu.__version__}" in line and "beam 3" in line
    with pytest.raises(ValueError, match="has no `decoder`"):
        SMALL.judge({}, None)


def matmul_flops(jaxpr):
    """Return FLOPs of all products; those inside a scan count once per iteration."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)
        for parameter in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: isinstance(x, core.Jaxpr)):
            inner = parameter.jaxpr if isinstance(parameter, core.ClosedJaxpr) else parameter
            if isinstance(inner, core.Jaxpr):
                total += eqn.params.get("length", 1) * matmul_flops(inner)
    return total


def test_flops_match_the_traced_matmuls():
    """Count every matmul of loss and gradient. Fault: the formula lacks a term or counts it twice."""
    abstract = jax.eval_shape(SMALL.init, jax.random.key(0), spec_of(batch_of()))
    jaxpr = jax.make_jaxpr(functools.partial(loss_and_gradient, SMALL))(abstract, batch_of()).jaxpr
    assert SMALL.flops(spec_of(batch_of())) == matmul_flops(jaxpr)


def test_logical_axes_name_every_dimension():
    """Faults: axes do not fit the arrays; boxes remain in the tree; no rule has a name."""
    variables = jax.eval_shape(SMALL.init, jax.random.key(0), spec_of(batch_of()))
    sizes = {"embed": 16, "mlp": 24, "heads": 2, "kv_heads": 2, "kv": 4, "vocab": 24, "norm": 16}

    def check(path, array, names):
        assert type(array) is jax.ShapeDtypeStruct
        layers = {"encoder": 2, "decoder": 3}.get(path[1].key)
        assert array.shape == tuple(layers if name == "layers" else sizes[name] for name in names)
        assert (layers is None) == ("layers" not in names)

    jax.tree_util.tree_map_with_path(check, variables, SMALL.logical_axes(variables))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_layers": 0}, "decoder_layers=0"),
        ({"head_dim": 7}, "head_dim=7: .* 8"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1"),
        ({"beam_size": 0}, "beam_size=0"),
        ({"length_penalty": -1.0}, "length_penalty=-1.0"),
        ({"remat": "some"}, "'some': use one of none, full, dots"),
        ({"compute_dtype": "float16"}, "'float16'"),
        ({"vocab_size": 1}, "vocab_size=1"),
    ],
)
def test_fields_are_checked(fields, message):
    """Fault: an invalid value is accepted at construction and fails inside a trace."""
    with pytest.raises(ValueError, match=message):
        TranslationTask(**fields)


def test_a_batch_without_pairs_is_refused():
    """Fault: data for another kind of model give a KeyError inside a trace."""
    with pytest.raises(ValueError, match=r"\['tokens'\] and not both 'source' and 'target'"):
        SMALL.init(jax.random.key(0), {"tokens": jax.ShapeDtypeStruct((2, 2), jnp.int32)})
