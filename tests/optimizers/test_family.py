"""Test properties of single preconditioners. Properties of all are tested with Shampoo."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from optimizing import PLAIN, by_block, gradients, inherited, optimizer, train, zeros

from shampax.optimizers import ShampooOptions
from shampax.optimizers.linalg.polynomials import orthogonalized
from shampax.optimizers.linalg.symmetric import unpack
from shampax.optimizers.preconditioners import PRECONDITIONERS
from shampax.optimizers.preconditioners.base import Blocks

SHAPE = {"w": (64, 32)}
SIDES = ("left", "right")


def options(kind, **values):
    return ShampooOptions(**PLAIN | {"block_size": 64, "treatments": ((".*", kind),)} | values)


@pytest.mark.parametrize("interval", [1, 10])
def test_soap_stays_bounded_when_gradients_turn(interval):
    """Fault: the second moment stays in the old basis. When gradients turn abruptly, it is too small and the update
    many times too long."""
    random = np.random.default_rng(0)
    turns = [np.linalg.qr(random.normal(size=(n, n)))[0] for n in (64, 64, 32, 32)]
    scale = np.outer(10.0 ** -np.linspace(0, 3, 64), 10.0 ** -np.linspace(0, 3, 32))
    stream = []
    for t in range(300):
        left, right = (turns[0], turns[2]) if t < 150 else (turns[1], turns[3])
        stream.append({"w": (left @ (scale * random.normal(size=(64, 32))) @ right).astype(np.float32)})
    run = train(options("soap", interval=interval), stream)
    norms = [np.linalg.norm(update["w"]) for update in run.updates]
    assert max(norms) <= 1.05 * np.sqrt(64 * 32)
    (name,) = run.states[-1].buckets
    moments = [np.asarray(state.buckets[name].roots.second_moment) for state in run.states]
    assert all(np.min(v) >= 0 for v in moments)
    assert all(np.any(v != before) for before, v in itertools.pairwise(moments))
    assert int(run.states[-1].buckets[name].roots.refreshes.sum()) >= 300 // interval - 1


def test_soap_in_the_identity_basis_is_adam():
    """Fault: moments, corrections or epsilon differ from Adam's."""
    stream = gradients(20, SHAPE)
    run = train(options("soap", start_step=1000), stream)
    adam, state = optax.adam(1.0, b1=0.9, b2=0.99), None
    for grads, update in zip(stream, run.updates, strict=True):
        state = adam.init(grads) if state is None else state
        wanted, state = adam.update(grads, state)
        np.testing.assert_allclose(update["w"], wanted["w"], atol=1e-6)


def test_soaps_basis_of_directions_without_statistics_is_not_made_of_rounding_errors():
    """Fault: rounding errors choose this basis, so that runs on two meshes drift apart."""
    random = np.random.default_rng(0)
    g = random.normal(size=(24, 8))
    noise = 3e-8 * np.abs(g @ g.T).max() * random.normal(size=(24, 24))
    both = np.stack([g @ g.T, g @ g.T + noise + noise.T]).astype(np.float32)
    soap, blocks = PRECONDITIONERS["soap"], Blocks(None, jnp.full(2, 24), None)
    old = jnp.zeros_like(both)
    for _ in range(2):  # by `eigh`, then by iteration from one basis
        q = np.asarray(jax.jit(lambda a, old: soap.solve(a, old, blocks).root)(both, old))
        np.testing.assert_allclose(q.swapaxes(-2, -1) @ q, np.stack([np.eye(24)] * 2), atol=1e-5)
        assert np.max(np.abs(g.T @ q[0, :, 8:])) <= 1e-4
        np.testing.assert_allclose(np.abs(q[0]), np.abs(q[1]), atol=1e-4)
        old = jnp.stack([q[0], q[0]])
    roots = [soap.solve_on_host(a.astype(np.float64), None, None)[0].root for a in both]
    np.testing.assert_allclose(np.abs(roots[0]), np.abs(roots[1]), atol=1e-4)


@pytest.mark.parametrize("moves", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_soap_with_young_statistics_does_not_amplify_rounding_errors(moves):
    """Fault: 20 steps after a move to another mesh, where gradients round differently, parameters differ by 1e-3."""
    shapes = {"deep": (48, 2), "square": (24, 24), "wide": (3, 40)}
    chosen, devices = options("soap", interval=4), np.array(jax.devices())
    old, new = (
        (Mesh(devices.reshape(4, 2), ("fsdp", "tensor")), Mesh(devices[:3], ("data",))) if moves else (None, None)
    )
    params, stream, random = zeros(shapes), gradients(30, shapes), np.random.default_rng(1)
    stayed, txs = train(chosen, stream, mesh=old), (optimizer(chosen, old), optimizer(chosen, new))
    state = inherited(txs[1], params, txs[0].layout(params).manifest(), stayed.states[9])
    rounded = [
        {k: (g * (1 + 6e-8 * random.normal(size=g.shape))).astype(np.float32) for k, g in t.items()} for t in stream
    ]
    moved = train(chosen, rounded[10:], state=state, mesh=new)
    for name in shapes:
        here, there = (sum(update[name] for update in updates) for updates in (stayed.updates[10:], moved.updates))
        assert np.linalg.norm(there - here) <= 1e-5 * np.linalg.norm(here), name


def test_soaps_second_moment_keeps_its_sum_when_the_basis_changes():
    """Fault: weights are not squared rotations, whose rows and columns add up to one."""
    stream = gradients(9, SHAPE)
    fast = train(options("soap", interval=1, beta1=0.0), stream)
    (name,) = fast.states[-1].buckets
    v = np.asarray(fast.states[-1].buckets[name].roots.second_moment, np.float64)
    squares = sum(0.01 * 0.99 ** (8 - t) * np.sum(np.square(g["w"], dtype=np.float64)) for t, g in enumerate(stream))
    np.testing.assert_allclose(v.sum(), squares, rtol=1e-4)


def test_kl_shampoo_of_one_side_is_one_sided_shampoo():
    """Fault: a side without statistics is whitened, or its length divides."""
    treatments = {f"{kind} {side}": f"{kind} side={side}" for kind in ("kl_shampoo", "one_sided") for side in SIDES}
    stream = [dict.fromkeys(treatments, g["w"]) for g in gradients(12, SHAPE)]
    values = {"block_size": 64, "interval": 2, "phases": 1, "ridge": 1e-2, "exponent": 0.5}
    chosen = ShampooOptions(**values, treatments=tuple(treatments.items()))
    for update in train(chosen, stream).updates:
        for side in SIDES:
            here, there = update[f"kl_shampoo {side}"], update[f"one_sided {side}"]
            # XLA may fuse and round one formula differently.
            np.testing.assert_allclose(here, there, rtol=0, atol=1e-5 * np.abs(there).max())


def test_kl_shampoos_statistics_are_the_covariance_of_a_kronecker_product():
    """Fault: a wrong length or side. Gradients A^(1/2) Z B^(1/2) have covariance A (x) B, which the product of the
    statistics must equal up to scale."""
    random = np.random.default_rng(0)
    a, b = (np.diag(np.linspace(0.5, 2, n) ** 2) for n in (12, 8))
    a *= 100
    stream = [{"w": (np.sqrt(a) @ random.normal(size=(12, 8)) @ np.sqrt(b)).astype(np.float32)} for _ in range(400)]
    run = train(options("kl_shampoo", interval=1, beta2=0.99), stream)
    (block,) = by_block(optimizer(options("kl_shampoo", interval=1)), zeros({"w": (12, 8)}), run.states[-1]).values()
    short, long = (unpack(s.astype(np.float64), r) for s, r in zip(block.roots.statistics, (8, 12), strict=True))
    found = np.kron(long, short) * 4.0 ** int(block.roots.scale_log2)
    wanted = np.kron(a, b)
    assert np.linalg.norm(found - wanted) <= 0.25 * np.linalg.norm(wanted)


@pytest.mark.parametrize("kind", ["kl_shampoo", "shampoo"])
def test_statistics_forget_directions_that_are_no_longer_excited(kind):
    """Fault: early statistics that are far too large suppress all later ones for hundreds of steps."""
    random = np.random.default_rng(0)
    stream = [{"w": random.normal(size=(24, 32)).astype(np.float32)} for _ in range(200)]
    for t, grads in enumerate(stream):
        grads["w"][slice(12, 24) if t < 11 else slice(0, 12)] = 0
    run = train(options(kind), stream)
    (block,) = by_block(optimizer(options(kind)), zeros({"w": (24, 32)}), run.states[-1]).values()
    rows = np.diag(unpack(block.roots.statistics[0].astype(np.float64), 24))
    assert rows[:12].sum() <= 0.08 * rows.sum()


def test_orthogonalization_brings_singular_values_to_one():
    """Fault: a wrong coefficient."""
    random = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(random.normal(size=(3, 16, 24)), full_matrices=False)
    s = np.geomspace(1, 1e-2, 16)
    x = orthogonalized(jnp.asarray(1e20 * (u * s) @ vt, jnp.float32), 5)
    found = np.linalg.svd(np.asarray(x), compute_uv=False)
    assert np.all(np.abs(found - 1) <= 0.35)
    transposed = orthogonalized(jnp.asarray(1e20 * np.swapaxes((u * s) @ vt, 1, 2), jnp.float32), 5)
    np.testing.assert_allclose(transposed, np.swapaxes(x, 1, 2), rtol=0, atol=1e-5)
    assert not np.any(np.asarray(orthogonalized(jnp.zeros((1, 4, 4)), 5)))


def test_muon_on_whole_matrices_equals_optax():
    """Fault: momentum or direction differ from Muon's. The length differs on purpose."""
    stream = gradients(6, {"w": (48, 20)})
    run = train(options("muon", nesterov=True, beta1=0.95), stream)
    tx = optax.contrib.muon(1.0, beta=0.95, nesterov=True)
    state = tx.init(stream[0])
    for grads, update in zip(stream, run.updates, strict=True):
        wanted, state = jax.jit(tx.update)(grads, state, grads)
        here, there = (np.asarray(x["w"], np.float64) for x in (update, wanted))
        assert np.sum(here * there) >= 0.99 * np.linalg.norm(here) * np.linalg.norm(there)


@pytest.mark.parametrize(
    "text",
    [
        "soap exponent=0.5",
        "kl_shampoo exponent=0.25",
        "muon view=tensor",
        "soap side=top",
        "muon orthogonalize=2",
        "shampoo view=tensor orthogonalize=1",
    ],
)
def test_inapplicable_treatment_words_are_refused(text):
    """Fault: a word is ignored."""
    with pytest.raises(ValueError, match=text.split(" ")[0]):
        options(text)
