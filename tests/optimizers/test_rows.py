"""Test row-wise AdaGrad for tables together with Shampoo for matrices: memory, sharding and takeover."""

import dataclasses
import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from optimizing import gradients, inherited, optimizer, place, train, zeros

from shampax.optimizers import ShampooOptions
from shampax.optimizers.checkpoint.manifest import SavedBlocks
from shampax.optimizers.plan import patterns

ROWS, DIM = 4096, 32
SHAPES = {"table": (ROWS, DIM), "w": (24, 16)}
# Blocks have no roots, because these tests are about tables.
OPTIONS = ShampooOptions(block_size=16, treatments=(("table", "rows"), (".*", "shampoo exponent=0")))
ELEMENTS = dataclasses.replace(OPTIONS, treatments=(("table", "diagonal"), (".*", "shampoo exponent=0")))
SPECS = {"table": PartitionSpec(("data", "fsdp")), "w": PartitionSpec()}


def mesh():
    return Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))


@pytest.fixture(scope="module")
def stream():
    """Return gradients that each look up a tenth of the rows."""
    random = np.random.default_rng(3)
    seen = [(random.random((ROWS, 1)) < 0.1).astype(np.float32) for _ in range(6)]
    return [g | {"table": g["table"] * rows} for g, rows in zip(gradients(6, SHAPES), seen, strict=True)]


@pytest.fixture(scope="module")
def run(stream):
    """Train six steps on one device."""
    return train(OPTIONS, stream)


def test_a_table_costs_four_bytes_a_row():
    """Fault: there is a momentum or an elementwise second moment: eight bytes per element."""
    state = jax.eval_shape(optimizer(OPTIONS).init, zeros(SHAPES))
    kept = jax.tree.leaves(state.diagonal["table"]._replace(age=None))
    assert sum(x.size * x.dtype.itemsize for x in kept) == 4 * ROWS
    assert optimizer(OPTIONS).layout(zeros(SHAPES)).plan.treatments["table"] == "rows (adagrad)"


def test_rows_that_are_not_looked_up_do_not_change(run, stream):
    """Fault: momentum or a decayed sum moves rows that a batch does not use."""
    for updates, grads in zip(run.updates, stream, strict=True):
        looked_up = grads["table"].any(axis=1)
        assert not updates["table"][~looked_up].any()
        assert (np.abs(updates["table"][looked_up]).max(axis=1) > 0).all()


def test_the_state_is_sharded_like_its_rows(run, stream):
    """Faults: sums are replicated; the result differs on a mesh."""
    sharded = train(OPTIONS, stream, mesh=mesh(), specs=SPECS)
    moment = sharded.states[-1].diagonal["table"].second_moment
    assert moment.shape == (ROWS,)
    assert {shard.data.shape for shard in moment.addressable_shards} == {(ROWS // 4,)}
    np.testing.assert_allclose(sharded.updates[-1]["table"], run.updates[-1]["table"], rtol=1e-5, atol=1e-9)


def test_tables_are_not_gathered(stream):
    """Fault: the update of a table moves rows between devices."""
    tx = optimizer(OPTIONS, mesh(), None, SPECS)
    params = place(zeros(SHAPES), mesh(), SPECS)
    shardings = tx.state_shardings(params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    out = (jax.tree.map(lambda x: x.sharding, params), shardings)
    step = jax.jit(tx.update, out_shardings=out).lower(place(stream[0], mesh(), SPECS), state, params).compile()
    moved = re.findall(r"= (\S+) (?:all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", step.as_text())
    assert moved and not [shapes for shapes in moved if f",{DIM}]" in shapes]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_refused_step_changes_nothing(run, stream, bad):
    """Fault: a row's sum keeps NaN, or infinity from the square of a finite gradient."""
    spoilt = jax.tree.map(np.copy, stream[0])
    spoilt["table"][7, 3] = bad
    after = train(OPTIONS, [spoilt], state=run.states[-1])
    assert int(after.states[-1].skipped) == 1
    assert not any(np.any(update) for update in after.updates[0].values())
    kept = replace(after.states[-1], skipped=run.states[-1].skipped)
    jax.tree.map(np.testing.assert_array_equal, kept, run.states[-1])


def test_resumes_bitwise(run, stream):
    """Fault: the state lacks something that the next step depends on."""
    first = train(OPTIONS, stream[:3])
    params = first.positions()[-1]
    saved = jax.tree.map(np.asarray, first.states[-1])
    tx = optimizer(OPTIONS)
    taken = inherited(tx, zeros(SHAPES), tx.layout(zeros(SHAPES)).manifest(), saved)
    jax.tree.map(np.testing.assert_array_equal, taken, saved)
    again = train(OPTIONS, stream[3:], params=params, state=jax.device_put(taken, jax.devices()[0]))
    for mine, whole in zip(again.updates, run.updates[3:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, mine, whole)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (OPTIONS, dataclasses.replace(OPTIONS, graft="rmsprop", beta2=0.9), ""),
        (ELEMENTS, OPTIONS, f"of shape [{ROWS}, {DIM}] there, [{ROWS}] here"),
        (OPTIONS, ELEMENTS, f"of shape [{ROWS}] there, [{ROWS}, {DIM}] here"),
        (OPTIONS, ShampooOptions(block_size=2048, exponent=0), f"of shape [{ROWS}] there, [{ROWS}, {DIM}] here"),
    ],
    ids=["other graft", "elements to rows", "rows to elements", "rows to blocks"],
)
def test_sums_are_restored_only_by_rows(run, stream, old, new, why):
    """Faults: elementwise sums are read as row sums; a change of the graft, which does not apply to them, drops
    them."""
    saved = jax.tree.map(np.asarray, run.states[-1] if old == OPTIONS else train(old, stream[:1]).states[-1])
    tx, manifest = optimizer(new), optimizer(old).layout(zeros(SHAPES)).manifest()
    names = dict(zip(patterns.paths(saved), jax.tree.leaves(saved), strict=True))
    shapes = {name: x.shape for name, x in names.items()}
    inheritance = tx.layout(zeros(SHAPES)).inheritance(json.loads(json.dumps(manifest)), shapes)
    assert inheritance.report()["table"]["second moment"] == why
    taken = inherited(tx, zeros(SHAPES), manifest, saved)
    if why:
        assert not any(x.any() for x in jax.tree.leaves(taken.diagonal.get("table")))
    else:
        jax.tree.map(np.testing.assert_array_equal, taken.diagonal["table"], saved.diagonal["table"])


@pytest.mark.parametrize("damage", [{"by_row": False}, {"shape": [DIM, ROWS]}])
def test_a_manifest_that_contradicts_the_arrays_is_refused(run, damage):
    """Fault: the sum of one row is read as that of another."""
    manifest = optimizer(OPTIONS).layout(zeros(SHAPES)).manifest()
    manifest["diagonal"]["table"] |= damage
    saved = run.states[-1]
    shapes = {name: x.shape for name, x in zip(patterns.paths(saved), jax.tree.leaves(saved), strict=True)}
    with pytest.raises(ValueError, match="invalid manifest of Distributed Shampoo"):
        SavedBlocks.read(manifest, shapes)
