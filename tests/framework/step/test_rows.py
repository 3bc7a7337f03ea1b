"""Test steps on the rows of tables that a batch uses, with DLRM on simulated devices."""

import math

import jax
import numpy as np
import pytest
import shrunk

from shampax.configs import base
from shampax.framework import dataset
from shampax.framework.base.errors import UserError
from shampax.framework.config import components
from shampax.framework.config.check import load
from shampax.framework.sharding import global_batch, placement
from shampax.framework.step.program import Program
from shampax.framework.step.state import make_initial
from shampax.models import tables
from shampax.optimizers.plan import patterns

SIZES = (3, 50, *(200,) * 24)
STEPS = 3


class Bench:
    """The compiled step of a tiny DLRM under AdaGrad, on four devices that share the rows."""

    def __init__(self, sizes=SIZES, **changes):
        tiny = [each for each in shrunk.DLRM if not each.startswith("mesh")]
        config = load("shampax/configs/dlrm.py:sample_adagrad", (*tiny, f"task.rows={sizes}"))
        config.mesh.update({"data": 2, "fsdp": 1, "tensor": 2})
        known = {"microbatches": 2, "gradient_clip": 0.02, "task.sparse_updates": True}
        config.update_from_flattened_dict(known | changes)
        task, data, options = components.build_all(config)
        self.mesh = placement.mesh_of(config, jax.devices()[: math.prod(config.mesh.values())])
        self.spec = global_batch.spec(dataset.spec(data), config.batch_size, self.mesh)
        with jax.set_mesh(self.mesh):
            self.program = Program(config, task, options, self.mesh, self.spec, lambda count: 0.05 + 0 * count)

    def compiled(self):
        with jax.set_mesh(self.mesh):
            return next(self.program.lower())[1].compile()

    def initial(self):
        program, names = self.program, patterns.paths(self.program.abstract)
        with jax.set_mesh(self.mesh):
            arrays = make_initial(program.task, program.tx, self.spec, program.abstract, 0, names)()
        return jax.tree.unflatten(jax.tree.structure(program.abstract), [arrays[name] for name in names])

    def batch(self, seed, categories=None):
        random = np.random.default_rng(seed)
        made = {name: random.integers(0, 2, x.shape).astype(x.dtype) for name, x in self.spec.items()}
        made["weight"][:] = 1
        shape = self.spec["categories"].shape
        made["categories"] = random.integers(0, 2**32, shape, np.uint32) if categories is None else categories
        return {name: jax.device_put(x, self.spec[name].sharding) for name, x in made.items()}

    def rows(self, batch):
        return np.unique(tables.row_numbers(np.asarray(batch["categories"]), self.program.task.rows))


@pytest.fixture(scope="module")
def sparse():
    bench = Bench()
    return bench, bench.compiled()


def trained(bench, step, steps=STEPS):
    state, measured = bench.initial(), []
    for number in range(steps):
        state, metrics = step(state, bench.batch(number))
        measured.append({name: float(metrics[name]) for name in metrics})
    return jax.tree.map(np.array, state), measured


def test_equals_the_dense_update(sparse):
    """Faults: a row or its sum is put back elsewhere; gradients of two devices or micro-batches are not added before
    they are squared; clipping has another norm; a row that is not used changes."""
    bench, step = sparse
    start = jax.tree.map(np.array, bench.initial())
    state, measured = trained(bench, step)
    dense = Bench(**{"task.sparse_updates": False})
    wanted, expected = trained(dense, dense.compiled())
    assert measured[-1]["clipped"] == STEPS
    for mine, other in zip(measured, expected, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(wanted.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    for x, y in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(wanted.opt_state), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4)
    used = np.unique(np.concatenate([bench.rows(bench.batch(number)) for number in range(STEPS)]))
    unused = np.setdiff1d(np.arange(tables.total_rows(SIZES)), used)
    table, sums = state.params["embedding"], state.opt_state.diagonal["embedding"].second_moment
    np.testing.assert_array_equal(table[unused], start.params["embedding"][unused])
    moved = (table[used] != start.params["embedding"][used]).any(axis=1)
    assert not sums[unused].any() and (sums[used][moved] > 0).all() and moved.mean() > 0.5


def test_cost_does_not_depend_on_the_size_of_tables(sparse):
    """Faults: a step computes a gradient, an update or a copy of all rows; it gathers them."""

    def cost(compiled):
        return compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]

    larger = Bench((100_000, *SIZES[1:])).compiled()
    assert cost(larger) == cost(sparse[1])
    assert f"[{tables.total_rows((100_000, *SIZES[1:]))},4]" not in larger.as_text()


def test_a_step_without_room_changes_nothing(sparse):
    """Fault: rows beyond the room of a device are dropped, or are those of another device."""
    bench, step = sparse
    every = np.broadcast_to(np.arange(200, dtype=np.uint32)[:, None], (200, 26))
    first = tables.row_numbers(every, SIZES) < tables.total_rows(SIZES) // 4
    of_first = np.stack([np.resize(np.flatnonzero(first[:, field]), 16) for field in range(26)], axis=1)
    start = bench.initial()
    before = jax.tree.map(np.array, start)
    state, metrics = step(start, bench.batch(0, of_first.astype(np.uint32)))
    assert metrics["skipped"] == 1
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(np.array, (state.params, state.opt_state)),
        (before.params, before.opt_state),
    )


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"ema_decay": 0.9}, r"config.ema_decay=0.9: an average changes all rows of 'embedding' in a step"),
        ({"optimizer.weight_decay": 0.1, "optimizer.decay_rules": ((".*", True),)}, "without weight decay"),
        ({"optimizer": base.component(base.ADAMW)}, "config.optimizer: the task updates only some rows of 'embedding'"),
        (
            {"sharding_rules": (("rows", "data"),)},
            r"are sharded over \('data',\), but sparse updates need \('data', 'tensor'\)",
        ),
    ],
    ids=["average", "decay", "AdamW", "sharding"],
)
def test_what_changes_all_rows_is_refused(changes, error):
    """Fault: rows that a batch does not use miss their update."""
    with pytest.raises(UserError, match=error):
        Bench(**changes).compiled()
