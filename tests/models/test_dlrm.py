import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from sklearn.metrics import log_loss, roc_auc_score

from shampax.framework.planning import collectives
from shampax.models import dlrm, tables
from shampax.models.dlrm import MISSING, DLRMTask, interactions, logarithms

SIZES = (3, 50, 700, 11)
TASK = DLRMTask(rows=SIZES, embed_dim=4, bottom=(8, 4), top=(8, 6))
EXAMPLES = 16


def clicks(count=EXAMPLES, seed=0):
    random = np.random.default_rng(seed)
    integers = random.integers(-3, 1000, (count, 5)).astype(np.int32)
    integers[random.random(integers.shape) < 0.2] = MISSING
    return {
        "label": random.integers(0, 2, count).astype(np.int32),
        "weight": np.ones(count, np.float32),
        "integers": integers,
        "categories": random.integers(0, 2**32, (count, len(SIZES)), dtype=np.uint32),
    }


def spec_of(batch):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}


@pytest.fixture(scope="module")
def variables():
    """Return parameters with values for missing integers, as after training."""
    made = jax.jit(lambda: TASK.init(jax.random.key(0), spec_of(clicks())))()
    made["params"]["missing"] = jnp.arange(5.0) / 5
    return made


@functools.partial(jax.jit, static_argnames=("task", "train"))
def loss_of(variables, batch, key, task=TASK, *, train=False):
    return task.loss(variables, batch, key=key, train=train)


def row_numbers(categories, sizes=SIZES):
    """Return the rows of categories: those of all tables are numbered, and number n is row reversed(n % 2^11), in bits,
    of the strips that n // 2^11 counts."""
    numbers = np.cumsum([0, *sizes[:-1]]) + categories.astype(np.int64) % sizes
    strips = np.vectorize(lambda number: int(f"{number % 2048:011b}"[::-1], 2))(numbers)
    return strips * (tables.total_rows(sizes) // 2048) + numbers // 2048


def reference_vectors(params, batch, example):
    """Look up the vectors of the categories of an example."""
    return list(params["embedding"][row_numbers(batch["categories"])[example]])


def reference_logits(params, batch, vectors_of=reference_vectors):
    """Compute the model in float64, one example after the other."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def mlp(layers, x):
        for number in range(len(layers)):
            x = np.maximum(x @ layers[f"layer_{number}"]["kernel"] + layers[f"layer_{number}"]["bias"], 0)
        return x

    logits = []
    for example, integers in enumerate(batch["integers"]):
        known = [params["missing"][i] if x == MISSING else np.log(1 + max(int(x), 0)) for i, x in enumerate(integers)]
        vectors = [mlp(params["bottom"], np.array(known)), *vectors_of(params, batch, example)]
        pairs = [vectors[i] @ vectors[j] for i in range(len(vectors)) for j in range(i)]
        hidden = mlp(params["top"], np.concatenate([vectors[0], pairs]))
        logits.append(float((hidden @ params["logit"]["kernel"] + params["logit"]["bias"])[0]))
    return np.array(logits)


def test_agrees_with_numpy_in_float64(variables):
    """Faults: a table starts in the rows of another; a hash above 2^31 becomes negative; a pair of vectors is missing
    or doubled; a missing integer counts as a number."""
    batch = clicks()
    assert (batch["categories"] >= 2**31).any() and (batch["integers"] == MISSING).any()
    logits, _ = jax.jit(TASK.logits)(variables, batch)
    np.testing.assert_allclose(logits, reference_logits(variables["params"], batch), rtol=1e-4, atol=1e-5)


def bags(batch, most=3):
    """Return the batch with up to `most` values of each category, and other numbers after the last of them."""
    random = np.random.default_rng(9)
    shape = batch["categories"].shape
    values = random.integers(0, most + 1, shape).astype(np.int32)
    return {**batch, "values": values, "categories": random.integers(0, 2**32, (*shape, most), dtype=np.uint32)}


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_multi_hot_categories_and_narrow_tables(pooling):
    """Faults: the vector of a category is that of another; padding counts as a value, or gets a gradient; a category
    without values is not a number; the rule of the widths has another base."""
    sizes = (3, 50, 60, 11)
    task = dataclasses.replace(TASK, rows=sizes, embed_dim=8, bottom=(8, 8), width_power=0.5, pooling=pooling)
    assert task.widths == (8, 2, 2, 4)
    batch = bags(clicks())
    variables = jax.jit(lambda: task.init(jax.random.key(0), spec_of(batch)))()
    names, fields = ("embedding", "embedding_2", "embedding_2", "embedding_4"), ((0,), (1, 2), (1, 2), (3,))
    for name in names:  # also rows of no category
        variables["params"][name] = jax.random.normal(jax.random.key(3), variables["params"][name].shape)

    def vectors_of(params, batch, example):
        found = []
        for field, (name, own) in enumerate(zip(names, fields, strict=True)):
            count = batch["values"][example, field]
            categories = np.zeros((count, len(own)), np.uint32)
            categories[:, own.index(field)] = batch["categories"][example, field, :count]
            rows = row_numbers(categories, [sizes[each] for each in own])[:, own.index(field)] if count else []
            vector = params[name][rows].sum(axis=0) / (max(count, 1) if pooling == "mean" else 1)
            found.append(vector @ params[f"projection_{field}"] if f"projection_{field}" in params else vector)
        return found

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def measured(params, batch):
        logits, _ = task.logits({"params": params}, batch)
        return jnp.sum(jnp.sin(logits)), logits

    (_, logits), gradient = measured(variables["params"], batch)
    wanted = reference_logits(variables["params"], batch, vectors_of)
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)
    real = np.arange(3) < batch["values"][..., None]
    cleaned = batch | {"categories": np.where(real, batch["categories"], 0)}
    (_, again), others = measured(variables["params"], cleaned)
    jax.tree.map(np.testing.assert_array_equal, (logits, gradient), (again, others))
    axes = task.logical_axes(variables)["params"]
    assert {name for name in axes if axes[name] == ("rows", None)} == set(names)


def test_padding_is_not_looked_up():
    """Fault: numbers after the last value of a category are looked up, and their rows sent."""
    batch = bags(clicks())
    (array,) = TASK.arrays.values()
    rows = array.lookups(jnp.asarray(batch["categories"]), jnp.asarray(batch["values"]))
    assert np.sum(np.asarray(rows) < tables.total_rows(SIZES)) == batch["values"].sum()


def test_interactions_are_the_lower_triangle():
    """Fault: the diagonal is included, or pairs are not exactly once."""
    dense, embedded = np.array([[1.0, 2.0]]), np.array([[[3.0, 5.0], [7.0, 11.0]]])
    assert interactions(jnp.asarray(dense), jnp.asarray(embedded)).tolist() == [[13.0, 29.0, 76.0]]


def test_integers_that_are_negative_or_large():
    """Faults: the logarithm gives NaN; the largest 32-bit integer overflows."""
    integers = jnp.asarray([[-1, 0, 2**31 - 1, MISSING + 1]], jnp.int32)
    np.testing.assert_allclose(logarithms(integers), [[0, 0, np.log(2.0**31), 0]], rtol=1e-6)


def test_normalized_integers():
    """Faults: missing integers count; statistics are too slow for short runs, are not used, or are changed by
    evaluation."""
    task = dataclasses.replace(TASK, normalize_integers=True)
    batches = [clicks(seed=seed) for seed in range(3)]
    for batch in batches:
        batch["integers"][:, 4] = MISSING
        batch["integers"][:, 3] = 7
    variables = jax.jit(lambda: task.init(jax.random.key(0), spec_of(batches[0])))()
    for batch in batches:
        _, (state, _) = loss_of(variables, batch, jax.random.key(0), task, train=True)
        variables = {"params": variables["params"], **state}
    kept = variables["statistics"]["normalized"]
    seen = [[np.log1p(np.maximum(x[x != MISSING], 0.0)) for x in batch["integers"].T] for batch in batches]
    for column in range(3):
        np.testing.assert_allclose(kept["mean"][column], np.mean([x[column].mean() for x in seen]), rtol=1e-5)
        np.testing.assert_allclose(kept["variance"][column], np.mean([x[column].var() for x in seen]), rtol=1e-5)
    assert kept["variance"][3] < 1e-9 and (kept["mean"][4], kept["variance"][4]) == (0, 1)

    _, (after, _) = loss_of(variables, batches[0], jax.random.key(0), task)
    jax.tree.map(np.testing.assert_array_equal, after["statistics"], variables["statistics"])
    loss, _ = loss_of(variables, batches[0], jax.random.key(0), task)
    moved = batches[0] | {"integers": batches[0]["integers"].copy()}
    moved["integers"][1:, 0] = 5  # other examples do not matter in evaluation
    one = [jax.jit(task.logits)(variables, batch)[0][0] for batch in (batches[0], moved)]
    assert one[0] == one[1] and np.isfinite(loss)
    trained, _ = loss_of(variables, batches[0], jax.random.key(0), task, train=True)
    assert np.isfinite(trained) and trained != loss


def test_loss_and_metrics(variables):
    """Faults: the label has the wrong sign; nats overflow for large logits."""
    batch = clicks()
    loss, (state, metrics) = loss_of(variables, batch, jax.random.key(0))
    chances = 1 / (1 + np.exp(-reference_logits(variables["params"], batch)))
    assert loss == pytest.approx(log_loss(batch["label"], chances), rel=1e-5)
    assert metrics["accuracy"][0] == np.sum((chances > 0.5) == batch["label"])
    assert state == {} and metrics["loss"][1] == EXAMPLES


def test_examples_of_zeros_have_no_weight(variables):
    """Fault: padding of the last held-out batch counts as examples without a click."""
    batch = clicks()
    padded = {name: np.concatenate([x, np.zeros((3, *x.shape[1:]), x.dtype)]) for name, x in batch.items()}
    (loss, (_, metrics)), (again, (_, wanted)) = (
        loss_of(variables, some, jax.random.key(0)) for some in (padded, batch)
    )
    assert loss == pytest.approx(float(again), rel=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], wanted["accuracy"])
    empty = {name: x[EXAMPLES:] for name, x in padded.items()}
    gradient = jax.grad(lambda v: loss_of(v, empty, jax.random.key(0), train=True)[0])(variables)
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_dropout_is_only_in_training(variables):
    """Faults: dropout is never applied, is applied to held-out examples, or is equal at every step."""
    task, batch = dataclasses.replace(TASK, dropout=0.5), clicks()
    losses = [
        float(loss_of(variables, batch, jax.random.key(seed), task, train=train)[0])
        for seed, train in ((0, True), (1, True), (0, False), (1, False))
    ]
    assert losses[2] == losses[3] == float(loss_of(variables, batch, jax.random.key(0), train=True)[0])
    assert len(set(losses[:3])) == 3


def test_flops_count_every_product():
    """Fault: the FLOPs for MFU lack a layer or the pairs of vectors."""
    weights = 5 * 8 + 8 * 4 + (4 + 10) * 8 + 8 * 6 + 6
    assert TASK.flops(spec_of(clicks())) == 6 * EXAMPLES * (weights + 25 * 4)


def test_initial_tables_are_as_published():
    """Faults: all tables have one bound; their distribution is not uniform; rows have the bound of another table."""
    sizes = (3, 1000, 20_000)
    table = np.asarray(tables.initial_tables(jax.random.key(0), sizes, 16))
    assert table.shape == (22_528, 16) and np.sum(~table.any(axis=1)) == 22_528 - sum(sizes)
    for number, size in enumerate(sizes):
        every = jnp.zeros((size, 3), jnp.uint32).at[:, number].set(jnp.arange(size, dtype=jnp.uint32))
        own = table[tables.row_numbers(every, sizes)[:, number]]
        assert np.abs(own).max() <= size**-0.5
        assert np.abs(own).max() > 0.85 * size**-0.5
        assert own.std() == pytest.approx((3 * size) ** -0.5, rel=0.2)


def test_every_device_owns_a_part_of_small_tables():
    """Faults: two categories share a row; a device owns all rows of the small tables, which are looked up most."""
    sizes = (16, 40, 100_000, 24)
    every = jnp.broadcast_to(jnp.arange(100_000, dtype=jnp.uint32)[:, None], (100_000, 4))
    rows = np.asarray(tables.row_numbers(every, sizes))
    used = [np.unique(rows[:size, number]) for number, size in enumerate(sizes)]
    assert len(np.unique(np.concatenate(used))) == sum(sizes) and rows.max() < tables.total_rows(sizes)
    for own in used:
        owned = np.bincount(own // (tables.total_rows(sizes) // 8), minlength=8)
        assert owned.max() - owned.min() <= 2


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"bottom": (8, 5)}, r"task.bottom=\(8, 5\): must end in task.embed_dim=4"),
        ({"rows": (3, 0)}, r"task.rows=\(3, 0\): give sizes of at least 1"),
        ({"rows": (2**30, 2**30)}, "task.rows: 2,147,483,648 rows in total; at most 2,147,481,600"),
        ({"dropout": 1.0}, "task.dropout=1.0"),
        ({"compute_dtype": "float16"}, "task.compute_dtype='float16'"),
        ({"width_power": -0.5}, "task.width_power=-0.5"),
        ({"pooling": "max"}, "task.pooling='max'"),
    ],
)
def test_invalid_fields_are_refused(fields, error):
    """Faults: a traceback inside the model; row numbers overflow."""
    with pytest.raises(ValueError, match=error):
        dataclasses.replace(TASK, **fields)


def test_data_of_another_kind_are_refused():
    """Fault: text data, or another number of categories, ends in a traceback."""
    with pytest.raises(ValueError, match="no 'categories'; DLRM needs click data"):
        TASK.init(jax.random.key(0), {"tokens": jax.ShapeDtypeStruct((4, 9), np.int32)})
    with pytest.raises(ValueError, match="has 2 tables, but the data have 4 categories"):
        dataclasses.replace(TASK, rows=(3, 4)).init(jax.random.key(0), spec_of(clicks()))


# Tables sharded over devices

AXES = ("slice", "data", "fsdp", "tensor")
MESHES = {"2x2x2": (1, 2, 2, 2), "8x1x1": (1, 8, 1, 1), "1x1x8": (1, 1, 1, 8), "2x1x1": (1, 2, 1, 1)}
SLICES = (2, 2, 1, 2)
LARGE = (3, 50, 70_000, 11)  # of more than a megabyte with this width
WIDTH = 4


def mesh_of(shape):
    devices = np.asarray(jax.devices()[: np.prod(shape)])
    return Mesh(devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * 4)


def gradients_of_lookup(table, rows, weights):
    """Return looked-up rows and the gradient of the table."""

    def weighted(table):
        found = tables.look_up(table, rows, jnp.dtype(jnp.float32))
        found = jnp.where(rows[..., None] < len(table), found, 0)
        return (found * weights).sum(), found

    (_, found), gradient = jax.value_and_grad(weighted, has_aux=True)(table)
    return found, gradient


def looked_up(shape, rows, sizes=LARGE, width=WIDTH):
    """Return (result on the mesh, result on one device, the compiled program)."""
    mesh, random = mesh_of(shape), np.random.default_rng(5)
    table = random.normal(size=(tables.total_rows(sizes), width)).astype(np.float32)
    weights = random.integers(-8, 9, (*rows.shape, width)).astype(np.float32)  # any order of sums has the same bits
    wanted = jax.jit(gradients_of_lookup)(*map(jnp.asarray, (table, rows, weights)))
    divided, batch = NamedSharding(mesh, PartitionSpec(AXES[1:])), NamedSharding(mesh, PartitionSpec(AXES[:3]))
    with jax.set_mesh(mesh):
        placed = jax.device_put((table, rows, weights), (divided, batch, batch))
        step = jax.jit(gradients_of_lookup, out_shardings=(batch, divided)).lower(*placed).compile()
        return step(*placed), wanted, step.as_text()


def rows_of(examples, sizes=LARGE):
    rows = np.array(tables.row_numbers(jnp.asarray(clicks(examples)["categories"]), sizes))
    rows[1] = rows[0]  # looked up twice, by one device
    rows[-1] = rows[0]  # and by another one
    rows[3::7, 1:3] = tables.total_rows(sizes)  # none
    return rows


def assert_the_same(results):
    (found, gradient), (wanted, wanted_gradient), *_ = results
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(gradient, wanted_gradient)


@pytest.fixture(scope="module", params=MESHES)
def lookup(request):
    return looked_up(MESHES[request.param], rows_of(64))


def test_sharded_tables_give_the_same(lookup):
    """Faults: a device reads the row of another; a gradient is lost, counted on two devices, or added elsewhere."""
    assert_the_same(lookup)


def test_tables_are_not_gathered(lookup):
    """Fault: a table or its gradient is gathered."""
    _, (found, _), text = lookup
    moved = collectives.find(text)
    assert moved
    assert max(collective.bytes for collective in moved) <= found.size * 4
    assert f"[{tables.total_rows(LARGE)},{WIDTH}]" not in text


def test_small_tables_are_gathered():
    """Fault: lookups in a small array take three all-to-alls, and sorting, instead of a gather."""
    *results, text = looked_up((1, 8, 1, 1), rows_of(64, SIZES), SIZES)
    assert_the_same(results)
    assert "all-to-all" not in {found.kind for found in collectives.find(text)}


@pytest.mark.parametrize(
    "shape", [MESHES["2x2x2"], MESHES["1x1x8"], SLICES, (1, 1, 1, 1)], ids=["2x2x2", "1x1x8", "slices", "one"]
)
def test_used_rows(shape):
    """Faults: a row is missing, twice, or on another device than its owner; a lookup has the place of another row; rows
    of the other slice, or beyond the first message, are missing."""
    total, owners = tables.total_rows(LARGE), np.prod(shape[1:])
    axes = tuple(axis for axis, size in zip(AXES[1:], shape[1:], strict=True) if size > 1)
    of_one_device = np.resize(np.arange(32), (64, 4))
    with jax.set_mesh(mesh_of(shape)):
        find = jax.jit(lambda rows: tables.used(rows, total, axes))
        for rows in (rows_of(64), of_one_device):
            used, place, filled = map(np.asarray, find(rows))
            np.testing.assert_array_equal(np.append(used, total)[place], rows)
            assert sorted(used[used < total]) == np.unique(rows[rows < total]).tolist() and filled < 1
            for number, part in enumerate(used.reshape(owners, -1)):
                assert (part[part < total] // (total // owners) == number).all()


def test_slices_look_up_their_own_examples():
    """Faults: rows travel between slices; the gradient of the examples of a slice is lost."""
    (*results, text) = looked_up(SLICES, rows_of(64))
    assert_the_same(results)
    swaps = [found for found in collectives.find(text) if found.kind == "all-to-all"]
    assert swaps and {found.group for found in swaps} == {4}


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 2, 1, 2)], ids=["8x1x1", "2x1x2"])
def test_rows_of_one_device_are_all_looked_up(shape):
    """Fault: rows beyond the places of a message are dropped."""
    rows = np.arange(256).reshape(64, 4)  # all on the first device
    assert_the_same(looked_up(shape, rows))


def test_traffic_falls_with_the_number_of_devices():
    """Faults: every device receives rows, or their numbers, of the whole batch; so for the rows in use."""
    rows = np.random.default_rng(1).integers(0, tables.total_rows(LARGE), (4_096, 26), np.int32)

    def bytes_of(text):
        """Return the bytes of the collectives' results on a device, and of those the bytes from other devices."""
        found = [each for each in collectives.find(text) if each.kind != "all-reduce" or each.bytes > 4]
        assert {each.kind for each in found} == {"all-to-all"}
        return sum(each.bytes for each in found), sum(each.sent for each in found)

    buffers, sent = {}, {}
    for devices in (2, 4, 8):
        *results, text = looked_up((1, devices, 1, 1), rows, width=16)
        assert_the_same(results)
        with jax.set_mesh(mesh_of((1, devices, 1, 1))):
            find = jax.jit(lambda rows: tables.used(rows, tables.total_rows(LARGE), ("data",))).lower(rows).compile()
        buffers[devices], sent[devices] = zip(bytes_of(text), bytes_of(find.as_text()), strict=True)
        looked, numbers = zip(buffers[devices], sent[devices], strict=True)
        print(f"{devices} devices: lookup {looked}, rows in use {numbers}: bytes in buffers, sent to others")
    for kind in (0, 1):
        assert buffers[8][kind] <= 0.3 * buffers[2][kind]
        assert sent[8][kind] <= 0.3 * 7 / 4 * sent[2][kind]  # of the rows 7 / 8 are elsewhere instead of 1 / 2


def test_a_step_on_a_mesh_gives_the_same(variables):
    """Fault: the sharded lookup differs inside the model, under jit and autodiff."""
    mesh, batch, task = mesh_of((1, 2, 2, 2)), clicks(), dataclasses.replace(TASK, rows=LARGE)
    table = tables.initial_tables(jax.random.key(1), LARGE, WIDTH)
    variables = {"params": variables["params"] | {"embedding": table}}

    def step(variables, batch):
        return jax.value_and_grad(lambda v: task.loss(v, batch, key=jax.random.key(0), train=True)[0])(variables)

    loss, gradient = jax.jit(step)(variables, batch)
    with jax.set_mesh(mesh):
        again, on_mesh = jax.jit(step)(variables, batch)
    assert again == pytest.approx(float(loss), rel=1e-6)
    for mine, whole in zip(jax.tree.leaves(on_mesh), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(mine, whole, rtol=1e-4, atol=1e-6)


# Judgement


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_auc_equals_scikit_learn(decimals):
    """Fault: ties count fully or not at all."""
    random = np.random.default_rng(decimals)
    labels = random.integers(0, 2, 5000)
    scores = np.round(random.normal(size=5000) + labels / 2, decimals).astype(np.float32)
    assert dlrm.auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)


def test_auc_without_both_classes():
    """Faults: a division by zero if a class is missing; NaN is ranked."""
    assert np.isnan(dlrm.auc(np.array([1.0, 2.0]), np.array([1, 1])))
    assert np.isnan(dlrm.auc(np.array([1.0, np.nan]), np.array([1, 0])))


def test_judgement():
    """Faults: a probability is read as a logit; labels are inverted; large logits overflow."""
    random = np.random.default_rng(1)
    labels, logits = random.integers(0, 2, 200), (3 * random.normal(size=200)).astype(np.float32)
    logits[:2], labels[:2] = (1e4, -1e4), (1, 0)
    chances = 1 / (1 + np.exp(-logits.astype(np.float64).clip(-700, 700)))
    metrics, line = TASK.judge({"logit": logits, "label": labels}, None)
    assert metrics["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
    assert metrics["log_loss"] == pytest.approx(log_loss(labels, chances), rel=1e-9)
    assert metrics["calibration"] == pytest.approx(chances.mean() / labels.mean(), rel=1e-9)
    assert f"200 held-out examples, {labels.mean():.1%} of them positive" in line
