"""Factors that are due stay while they suit their statistics: what suits, and what staying leaves alone and saves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizing import optimizer, train

from shampax.optimizers import ShampooOptions
from shampax.optimizers.linalg.roots import misfit
from shampax.optimizers.preconditioners import PRECONDITIONERS

KINDS = {"shampoo": 0.5, "one_sided": 0.5, "soap": 0.2, "kl_shampoo": 0.5}  # with a tolerance for each


def options(kind, **values):
    return ShampooOptions(block_size=24, treatments=((".*", kind),), **values)


def turned(count, turn):
    """Gradients of one covariance up to step `turn`, of another one afterwards."""
    random = np.random.default_rng(0)
    left, right = ([np.linalg.qr(random.normal(size=(n, n)))[0] for _ in range(2)] for n in (24, 16))
    scale = np.outer(np.geomspace(1, 0.1, 24), np.geomspace(1, 0.1, 16))
    stream = []
    for t in range(count):
        g = left[t >= turn] @ (scale * random.normal(size=(24, 16))) @ right[t >= turn]
        stream.append({"w": g.astype(np.float32)})
    return stream


@pytest.mark.parametrize("p", [1, 2, 4])
def test_misfit_of_a_root(p):
    """Catches a wrong power, side, ridge, padding or scale, against float64."""
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(6, 6)))[0]
    then, now = np.geomspace(1, 1e-2, 6), np.geomspace(1, 1e-2, 6) * [1, 1, 1, 2, 2, 1]
    ridge = 1e-3
    root = (basis * (then + ridge * then.max()) ** (-1 / p)) @ basis.T
    cases = [(basis * then) @ basis.T, 4 * (basis * then) @ basis.T, (basis * now) @ basis.T, np.diag(then)]
    stack, roots = np.zeros((4, 8, 8)), np.zeros((4, 8, 8))
    stack[:, :6, :6], roots[:, :6, :6] = cases, root
    low, high = (np.linalg.matrix_power(root, k) for k in (p // 2, p - p // 2))
    for scale_free in (True, False):
        wanted = []
        for a in cases:
            m = low @ (a + ridge * np.linalg.eigvalsh(a)[-1] * np.eye(6)) @ high
            c = np.trace(m) / 6 if scale_free else 1.0
            wanted.append(np.linalg.norm(m - c * np.eye(6)) / np.linalg.norm(m))
        compiled = jax.jit(functools.partial(misfit, p=p, ridge=ridge, scale_free=scale_free))
        found = compiled(stack.astype(np.float32), roots.astype(np.float32), sizes_n=np.full(4, 6))
        np.testing.assert_allclose(found, wanted, atol=2e-4)
        assert (wanted[1] < 1e-9) == scale_free


@pytest.mark.parametrize(
    "kind",
    [
        "shampoo",
        "soap",
        pytest.param("one_sided", marks=pytest.mark.slow),
        pytest.param("kl_shampoo", marks=pytest.mark.slow),
    ],
)
def test_factors_stay_until_the_gradients_turn(kind):
    """Catches factors that stay for ever or never, and a block that counts as failing or as without roots for it."""
    stream = turned(60, 40)
    run = train(options(kind, interval=2, beta2=0.95, tolerance=KINDS[kind]), stream)
    (name,) = run.states[-1].buckets
    seen = [state.buckets[name].roots for state in run.states]
    spared = [np.array([int(side.sum()) for side in roots.spared]) for roots in seen]
    assert np.all(spared[39] - spared[19] > 0)
    assert np.all(spared[59] - spared[41] < 9)
    for before, after, old, new in zip(seen[:-1], seen[1:], spared[:-1], spared[1:], strict=True):
        for k, stayed in enumerate(new - old):
            same = np.array_equal(before.roots[k], after.roots[k])
            due = int(after.refreshes.sum()) > int(before.refreshes.sum())
            assert same == bool(stayed or not due)
    assert int(seen[-1].failures.sum()) == 0
    diagnostics = optimizer(options(kind)).diagnostics(run.states[-1])
    assert 0 < float(diagnostics["spared"]) < 1
    assert int(seen[-1].refreshed.min()) >= 59


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_lets_the_same_factors_stay(kind):
    """Catches a host that solves what is to stay, or puts something in its place."""
    solved = []
    family = PRECONDITIONERS[kind]

    class Counting(type(family)):
        def solve_on_host(self, a, size, group, options):
            solved.append(len(a))
            return super().solve_on_host(a, size, group, options)

    counting = object.__new__(Counting)
    counting.__dict__.update(family.__dict__)
    chosen = dataclasses.replace(
        options(kind, interval=2, beta2=0.95, tolerance=KINDS[kind]), refresh="host", delay=0, host_workers=1
    )
    tx = optimizer(chosen)
    stream = turned(40, 60)
    params = jax.tree.map(jnp.zeros_like, stream[0])
    init, step = jax.jit(tx.init), jax.jit(tx.update)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRECONDITIONERS, family.name, counting)
        service = tx.host_roots(params)
        state = service.start(init(params))
        for grads in stream:
            state = service.install(state)
            _, state = step(grads, state, params)
            service.take(state)
        state = service.install(state)
        service.close()
    (roots,) = (bucket.roots for bucket in state.buckets.values())
    due = len(roots.spared) * int(roots.refreshes.sum())
    spared = sum(int(side.sum()) for side in roots.spared)
    assert spared > 5 and due - spared == len(solved)
    assert int(roots.failures.sum()) == 0


def test_nothing_stays_without_a_tolerance():
    """Catches a comparison that lets a perfect factor stay: 0 is a promise that all are renewed."""
    diagonal = {"w": np.diag(np.arange(8, 0, -1)).astype(np.float32)}  # in whose basis nothing is off the diagonal
    run = train(options("soap", interval=1, beta2=0.95), [diagonal] * 6)
    (bucket,) = run.states[-1].buckets.values()
    assert not any(int(side.sum()) for side in bucket.roots.spared)
    assert int(bucket.roots.refreshes.sum()) == 6


def test_a_tolerance_that_means_nothing_is_refused():
    """Catches one that every factor is within, and one that no root under a cut can be."""
    with pytest.raises(ValueError, match=r"tolerance is 1\.5"):
        ShampooOptions(tolerance=1.5)
    with pytest.raises(ValueError, match="set a ridge"):
        ShampooOptions(tolerance=0.1, ridge=0.0, cut=1e-3)
    ShampooOptions(tolerance=0.1, ridge=0.0, cut=1e-3, treatments=((".*", "soap"),))
