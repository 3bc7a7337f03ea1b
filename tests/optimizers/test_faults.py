"""Force faults of long runs: gradients that are not finite, and solvers that fail."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizing import (
    FAMILY_OPTIONS,
    FAMILY_PARAMETERS,
    FAMILY_SHAPES,
    LAYOUTS,
    SHARDED_OPTIONS,
    SHARDED_SHAPES,
    SIBLINGS,
    by_block,
    family_layout,
    gradients,
    optimizer,
    train,
)

from shampax.optimizers import ShampooOptions
from shampax.optimizers.preconditioners import PRECONDITIONERS, shampoo


def assert_same(x, y):
    """Compare bitwise."""
    jax.tree.map(np.testing.assert_array_equal, x, y)


@functools.cache
def clean_run(shared, layout):
    """Return (gradients, a function that trains on some of them, the run on all of them) for Shampoo or its
    siblings."""
    mesh, specs = family_layout(layout) if shared else LAYOUTS[layout]
    options, shapes = (FAMILY_OPTIONS, FAMILY_SHAPES) if shared else (SHARDED_OPTIONS, SHARDED_SHAPES)
    stream, on_mesh = gradients(7, shapes), functools.partial(train, options, mesh=mesh, specs=specs)
    return stream, on_mesh, on_mesh(stream)


@pytest.mark.parametrize(
    ("layout", "bad", "kind"),
    [
        *(("fsdp x tensor", bad, "shampoo") for bad in (np.nan, np.inf, -np.inf, 1e30)),
        *(("fsdp x tensor", bad, kind) for kind in SIBLINGS for bad in (np.nan, 1e30)),
        *(
            pytest.param(layout, bad, "shampoo", marks=pytest.mark.slow)
            for layout in ("replicated", "fsdp")
            for bad in (np.nan, np.inf, -np.inf, 1e30)
        ),
    ],
)
def test_a_gradient_that_is_not_finite_changes_nothing(layout, bad, kind):
    """Faults: NaN or overflowing squares in one element on one device reach moments, statistics, roots or parameters;
    devices decide differently; the later run differs from one without the step."""
    stream, on_mesh, clean = clean_run(kind != "shampoo", layout)
    down, other = ("down", "bias") if kind == "shampoo" else FAMILY_PARAMETERS[kind]
    for name, at in ((down, (50, 3)), (other, (9,))):
        poisoned = {k: -g for k, g in stream[0].items()}
        poisoned[name][at] = bad
        hit = on_mesh([poisoned, *stream[5:]], state=clean.states[4])
        assert not any(np.any(u) for u in hit.updates[0].values())
        assert [int(copy.data) for copy in hit.states[0].skipped.addressable_shards] == [1] * 8
        assert_same(replace(hit.states[0], skipped=0), replace(clean.states[4], skipped=0))
        for then, now in zip(clean.updates[5:], hit.updates[1:], strict=True):
            assert_same(now, then)
        assert_same(replace(hit.states[-1], skipped=0), replace(clean.states[-1], skipped=0))


# A matrix of statistics whose first k rows are zero triggers fault k; gradients of `a` and `b` can do this.
FAULTS = ["residual above the bound", "residual NaN", "one NaN in the root", "root Inf", "root twice too large"]


def faulty(solver):
    def solve(stack, *arguments):
        result = solver(stack, *arguments)
        fault = jnp.sum(jnp.cumprod(jnp.diagonal(stack, axis1=-2, axis2=-1) == 0, axis=-1), axis=-1)
        residual = jnp.where(fault == 1, 0.11, jnp.where(fault == 2, jnp.nan, result.residual))
        fault = fault[:, None, None]
        first = jnp.zeros(stack.shape[-2:], bool).at[0, 0].set(True)
        root = jnp.where((fault == 3) & first, jnp.nan, jnp.where(fault == 4, jnp.inf, result.root))
        return result._replace(root=jnp.where(fault == 5, 2 * root, root), residual=residual)

    return solve


SHAPES = {"a": (16, 16), "b": (32, 16), "c": (16, 16)}
OPTIONS = {
    "block_size": 16,
    "interval": 1,
    "exponent": 0.25,
    "ridge": 1e-4,
    "beta2": 0.0,
    "beta1": 0.0,
    "graft": "none",
    "orthogonalize": 0,
    "max_failures": 3,
}
PARAMETERS = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in SHAPES.items()}
GOOD = 3


@pytest.fixture(scope="module")
def faulty_options():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shampoo.SOLVERS, "faulty", faulty(shampoo.SOLVERS["newton"]))
        yield ShampooOptions(solver="faulty", **OPTIONS)


@pytest.mark.parametrize(("fault", "times"), [*((k, 3) for k in range(1, 6)), (1, 1), (1, 10), (3, 1), (3, 10)])
def test_a_failing_solver_keeps_roots_then_falls_back_then_recovers(faulty_options, fault, times):
    """Faults: a bad root is used; a failure is not counted or shown; the fall-back is too early, too late or permanent;
    a failure reaches another block of its bucket or parameter."""
    stream = gradients(GOOD + times + 3, SHAPES)
    clean = train(faulty_options, stream)
    for t in range(GOOD, GOOD + times):
        stream[t] = {k: g.copy() for k, g in stream[t].items()}
        stream[t]["a"][:fault] = stream[t]["a"][:, :fault] = 0
        stream[t]["b"][16 : 16 + fault] = stream[t]["b"][16:, :fault] = 0
    run, tx = train(faulty_options, stream), optimizer(faulty_options)
    (bucket,) = tx.layout(PARAMETERS).plan.buckets
    diagnose = jax.jit(lambda state: state.layout.diagnostics(state))
    failing, rows = {"a": ("a", 0), "b": ("b", 1)}, {"a": slice(16), "b": slice(16, 32)}
    before = by_block(tx, PARAMETERS, run.states[GOOD - 1])
    for t, (update, state) in enumerate(zip(run.updates, run.states, strict=True)):
        blocks, others = by_block(tx, PARAMETERS, state), by_block(tx, PARAMETERS, clean.states[t])
        failures = t - GOOD + 1 if GOOD <= t < GOOD + times else 0
        for name, block in failing.items():
            found = blocks.pop(block).roots
            others.pop(block)
            assert found.failures == failures
            assert found.refreshed == (GOOD if failures else t + 1)
            if failures:
                assert_same(found.roots, before[block].roots.roots)
            direction, g = -update[name][rows[name]], stream[t][name][rows[name]]
            falls_back = t == 0 or (min(t - GOOD, times) >= faulty_options.max_failures and t <= GOOD + times)
            assert np.array_equal(direction, g) == falls_back, t
        assert_same(blocks, others)
        assert_same((update["b"][:16], update["c"]), (clean.updates[t]["b"][:16], clean.updates[t]["c"]))
        diagnostics = diagnose(state)
        assert diagnostics[f"{bucket.name}/failures"] == 2 * failures
        assert diagnostics[f"{bucket.name}/fallbacks"] == 2 * (failures >= faulty_options.max_failures)
    assert int(run.states[-1].skipped) == 0


@pytest.mark.parametrize("kind", [kind for kind in SIBLINGS if kind != "muon"])
def test_siblings_keep_their_factors_while_refreshes_fail(kind, monkeypatch):
    """Faults: a refused factor is used; failures are not counted; a failure reaches another block of the bucket."""
    member = PRECONDITIONERS[kind]

    class Failing(type(member)):
        def solve(self, stack, old, blocks):
            found = super().solve(stack, old, blocks)
            refused = stack[:, 0, 0] == 0
            factor = jnp.where(refused[:, None, None], jnp.nan, found.root)
            return found._replace(root=factor, accepted=found.accepted & ~refused)

    monkeypatch.setitem(PRECONDITIONERS, kind, Failing())
    options = ShampooOptions(interval=1, beta2=0.0, ridge=1e-4, treatments=((".*", kind),))
    shapes = {"a": (8, 6), "b": (8, 6)}
    stream = gradients(8, shapes)
    for t in (3, 4, 5, 6):
        stream[t]["a"][0] = stream[t]["a"][:, 0] = 0
    run, tx = train(options, stream), optimizer(options)
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    states = [by_block(tx, params, state) for state in run.states]
    assert [int(blocks["a", 0].roots.failures) for blocks in states] == [0, 0, 0, 1, 2, 3, 4, 0]
    assert [int(blocks["a", 0].roots.refreshed) for blocks in states] == [1, 2, 3, 3, 3, 3, 3, 8]
    for blocks in states[3:7]:
        assert_same(blocks["a", 0].roots.roots, states[2]["a", 0].roots.roots)
    assert [int(blocks["b", 0].roots.refreshed) for blocks in states] == [*range(1, 9)]
    assert all(np.all(np.isfinite(update[k])) for update in run.updates for k in shapes)
