import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shampoo_reference as reference
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shampax.optimizers import ShampooOptions, distributed_shampoo, roots

SHAPES = {"a": (24, 40), "b": (40, 24), "c": (33, 65)}


def gradients(steps, shapes=SHAPES, seed=0):
    random = np.random.default_rng(seed)
    return [{k: random.normal(size=s).astype(np.float32) for k, s in shapes.items()} for _ in range(steps)]


def train(options, stream, params, mesh=None, names=None, rate=0.01, param_spec=None):
    """Parameters after every step, and the last optimizer state."""
    tx = distributed_shampoo(rate, options, mesh=mesh, axis_names=names)
    params = jax.tree.map(jnp.asarray, params)
    if mesh is not None:
        params = jax.device_put(params, NamedSharding(mesh, param_spec or PartitionSpec()))
    state = jax.jit(tx.init, out_shardings=tx.state_shardings(params))(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    history = []
    for grads in stream:
        params, state = step(params, state, grads)
        history.append(jax.tree.map(np.asarray, params))
    return history, state


def zeros(shapes=SHAPES):
    return {k: np.zeros(s, np.float32) for k, s in shapes.items()}


REFERENCE_CASES = {
    "defaults": {},
    "block norm, nesterov, decay": {"graft_norm": "block", "nesterov": True, "weight_decay": 0.1},
    "periodic, sum, adagrad": {"refresh": "periodic", "beta2": 1.0, "graft": "adagrad"},
    "exponent 1/2, rmsprop": {"exponent": 0.5, "graft": "rmsprop"},
    "no momentum, sgd": {"beta1": 0.0, "graft": "sgd"},
    "no graft, eigh with cut": {"graft": "none", "solver": "eigh", "ridge": 0.0, "cut": 1e-3},
    "one-sided, sign": {"treatments": ((".*", "one_sided"),), "graft": "sign"},
}


@pytest.mark.parametrize("case", REFERENCE_CASES)
def test_agrees_with_the_float64_reference(case):
    """Catches any departure from the algorithm: order of operations, schedule, decay, norms."""
    options = ShampooOptions(**({"block_size": 32, "interval": 4, "ridge": 1e-4} | REFERENCE_CASES[case]))
    stream = gradients(20)
    params = {k: np.random.default_rng(1).normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
    history, _ = train(options, stream, params)
    one_sided = case.startswith("one-sided")
    wanted = reference.run(
        list(params.values()), [list(g.values()) for g in stream], options, 0.01, one_sided=one_sided
    )
    for now, then, start in zip(history[-1].values(), wanted[-1], params.values(), strict=True):
        moved = np.linalg.norm(then - start)
        assert np.linalg.norm(now - then) <= 2e-4 * moved


def test_same_run_on_any_mesh():
    """Catches owners, exchange or schedule that depend on how many devices there are, or on how parameters lie."""
    options = ShampooOptions(block_size=32, interval=4, ridge=1e-4)
    stream, params = gradients(9), zeros()
    alone, _ = train(options, stream, params)
    devices = np.array(jax.devices())
    for mesh, spec in [
        (Mesh(devices[:3], ("data",)), PartitionSpec()),
        (Mesh(devices.reshape(2, 2, 2), ("data", "fsdp", "tensor")), PartitionSpec()),
    ]:
        there, state = train(options, stream, params, mesh=mesh, param_spec=spec)
        for k in params:
            np.testing.assert_allclose(there[-1][k], alone[-1][k], atol=2e-4 * np.abs(alone[-1][k]).max())
        for array in jax.tree.leaves(state.buckets):
            assert array.addressable_shards[0].data.shape[0] * mesh.size == array.shape[0]


def program(mesh, shapes, names=None, spec=None):
    tx = distributed_shampoo(0.01, ShampooOptions(block_size=16, interval=4), mesh=mesh, axis_names=names)
    params = {
        k: jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec or PartitionSpec()))
        for k, s in shapes.items()
    }
    shardings = tx.state_shardings(params)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(tx.init, params), shardings
    )
    own = jax.tree.map(lambda x: x.sharding, params)
    return jax.jit(tx.update, out_shardings=(own, shardings)).lower(params, state, params).compile().as_text()


def test_two_all_to_alls_per_bucket_and_no_collective_in_a_loop():
    """Catches blocks joined by the automatic partitioner, or a solver loop that talks to other devices."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    shapes = {"a": (32, 32), "b": (64, 16), "c": (24, 48)}
    for spec in (PartitionSpec(), PartitionSpec("fsdp")):
        text = program(mesh, shapes, spec=spec)
        tx = distributed_shampoo(0.01, ShampooOptions(block_size=16), mesh=mesh)
        buckets = tx.plan({k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}).buckets
        count = {
            kind: len(re.findall(rf" {kind}(?:-start)?\(", text))
            for kind in ("all-to-all", "all-reduce", "collective-permute", "all-gather")
        }
        if not spec:
            assert count["all-to-all"] == 2 * len(buckets)
            assert count["collective-permute"] == 0
            assert count["all-gather"] <= len(shapes)
        bodies = re.findall(r"body=%?([\w.\-]+)", text) + re.findall(r"condition=%?([\w.\-]+)", text)
        assert bodies
        for name in bodies:
            start = text.index(f"%{name} (")
            body = text[start : text.index("\n}", start)]
            assert not re.search(r"all-to-all|all-reduce|all-gather|collective-permute|reduce-scatter", body)


def test_program_size_does_not_grow_with_layers():
    """Catches a Python loop over layers, blocks or parameters in the mathematics."""

    def dots(layers):
        tx = distributed_shampoo(0.01, ShampooOptions(block_size=16))
        params = {f"{kind}{i}": jnp.zeros((32, 48)) for kind in "abc" for i in range(layers)}
        text = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
        return text.count("dot_general"), text.count("stablehlo.while")

    assert dots(2) == dots(8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    """Catches NaN that reaches momentum, statistics, roots or parameters; the later run is that without the step."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    options = ShampooOptions(block_size=32, interval=2, ridge=1e-4)
    stream, params = gradients(6), zeros()
    poisoned = gradients(1, seed=9)[0]
    poisoned["c"][3, 4] = bad
    clean, clean_state = train(options, stream, params, mesh=mesh)
    hit, hit_state = train(options, [*stream[:3], poisoned, *stream[3:]], params, mesh=mesh)
    assert hit_state.skipped == 1 and clean_state.skipped == 0
    for k in params:
        np.testing.assert_array_equal(hit[3][k], hit[2][k])
        np.testing.assert_array_equal(hit[-1][k], clean[-1][k])
    jax.tree.map(np.testing.assert_array_equal, hit_state._replace(skipped=0), clean_state._replace(skipped=0))


def test_a_failing_solver_keeps_the_roots_then_falls_back_then_recovers(monkeypatch):
    """Catches a bad root that is used, a failure that is not counted, or one that spreads to other blocks."""
    newton = roots.SOLVERS["newton"]

    def fails_for_diagonal_matrices(stack, p, ridge, cut, sizes):
        result = newton(stack, p, ridge, cut, sizes)
        return result._replace(residual=jnp.where(stack[:, 0, 1] == 0, 9.0, result.residual))

    monkeypatch.setitem(roots.SOLVERS, "newton", fails_for_diagonal_matrices)
    shapes = {"a": (16, 16), "b": (16, 16)}
    options = ShampooOptions(interval=1, ridge=1e-4, beta2=0.0, max_failures=3, graft_norm="block")
    stream = gradients(9, shapes)
    for t in range(3, 7):
        stream[t]["a"] = np.diag(np.diag(stream[t]["a"]))
    tx = distributed_shampoo(0.01, options)
    params, counts = zeros(shapes), []
    state, update = tx.init(params), jax.jit(tx.update)
    before = None
    for t, grads in enumerate(stream):
        _, state = update(grads, state, params)
        (bucket,) = state.buckets.values()
        if t == 2:
            before = np.asarray(bucket.roots.roots[0][0])
        if 3 <= t < 7:
            np.testing.assert_array_equal(bucket.roots.roots[0][0], before)
        diagnostics = tx.diagnostics(state)
        counts.append((int(bucket.roots.failures[0]), int(diagnostics["16x16_both_p4/fallbacks"])))
        assert bucket.roots.failures[1] == 0 and bucket.roots.refreshed[1] == t + 1
    assert counts == [(0, 0)] * 3 + [(1, 0), (2, 0), (3, 1), (4, 1)] + [(0, 0)] * 2


def test_first_direction_is_the_polar_factor():
    """Catches wrong exponents or sides: with exponent 1/4 and no ridge, L^(-1/4) G R^(-1/4) = U V' for G = U S V'."""
    g = np.random.default_rng(3).normal(size=(24, 24)).astype(np.float32) + 3 * np.eye(24, dtype=np.float32)
    options = ShampooOptions(interval=1, ridge=0.0, beta1=0.0, graft="none")
    history, _ = train(options, [{"a": g}] * 3, {"a": np.zeros_like(g)}, rate=1.0)
    u, _, vt = np.linalg.svd(g.astype(np.float64))
    np.testing.assert_allclose(history[1]["a"] - history[2]["a"], u @ vt, atol=1e-4)


@pytest.mark.parametrize(
    ("graft", "twin"),
    [
        ("adam", optax.adam(0.01, b2=0.99)),
        ("sgd", optax.chain(optax.ema(0.9), optax.scale(-0.01))),
        ("adagrad", None),
    ],
)
def test_diagonal_treatment_is_the_graft_method(graft, twin):
    """Catches a diagonal parameter that gets anything but the method by itself."""
    if twin is None:
        twin = optax.chain(optax.scale_by_rss(0.0, eps=0.0), optax.scale(-0.01))
    options = ShampooOptions(
        treatments=((".*", "diagonal"),), graft=graft, beta1=0.0 if graft == "adagrad" else 0.9, epsilon=1e-8
    )
    stream, params = gradients(20), zeros()
    history, _ = train(options, stream, params)
    state, expected = twin.init(params), params
    for grads in stream:
        updates, state = twin.update(grads, state, expected)
        expected = optax.apply_updates(expected, updates)
    for k in params:
        np.testing.assert_allclose(history[-1][k], expected[k], atol=1e-6)


def test_scale_of_the_gradients_changes_no_direction():
    """Catches an absolute epsilon or tolerance anywhere in statistics or roots."""
    shapes = {"a": (16, 24)}
    options = ShampooOptions(interval=2, ridge=1e-6, graft="sgd", max_failures=3)
    directions = []
    for k in (-60, 0, 60):
        stream = [jax.tree.map(lambda g: g * np.float32(2.0) ** k, grads) for grads in gradients(5, shapes)]
        history, _ = train(options, stream, zeros(shapes), rate=2.0**-k)
        directions.append((history[-1]["a"] - history[-2]["a"]).astype(np.float64))
    for d in directions:
        cosine = np.sum(d * directions[1]) / np.linalg.norm(d) / np.linalg.norm(directions[1])
        assert cosine >= 1 - 1e-6


def test_zero_gradients_move_nothing():
    """Catches 0/0 in roots or grafting, and a zero parameter that disturbs its neighbours."""
    options = ShampooOptions(interval=1, ridge=1e-4)
    shapes = {"a": (16, 24), "b": (16, 24)}
    stream = gradients(4, shapes)
    silent = [{"a": g["a"], "b": np.zeros_like(g["b"])} for g in stream]
    history, state = train(options, silent, zeros(shapes))
    both, _ = train(options, stream, zeros(shapes))
    assert not np.any(history[-1]["b"])
    np.testing.assert_array_equal(history[-1]["a"], both[-1]["a"])
    (bucket,) = state.buckets.values()
    assert bucket.roots.failures.sum() == 0


def test_stacked_equals_separate():
    """Catches scanned layers whose norms or statistics mix."""
    stacked = gradients(6, {"w": (3, 16, 24)})
    separate = [{f"w{i}": g["w"][i] for i in range(3)} for g in stacked]
    options = ShampooOptions(interval=3, ridge=1e-4)
    one, _ = train(options, stacked, zeros({"w": (3, 16, 24)}), names={"w": ("layers", "embed", "mlp")})
    three, _ = train(options, separate, zeros({f"w{i}": (16, 24) for i in range(3)}))
    for i in range(3):
        np.testing.assert_allclose(one[-1]["w"][i], three[-1][f"w{i}"], atol=1e-7)


def test_weight_decay_needs_parameters():
    """Catches decay that is silently left out."""
    tx = distributed_shampoo(0.01, ShampooOptions(weight_decay=0.1))
    params = {"a": jnp.ones((8, 8))}
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))


def test_composes_with_optax():
    """Catches a transformation that optax.chain or a plain jitted loop cannot use."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), distributed_shampoo(0.1, ShampooOptions(interval=2)))
    target = jnp.asarray(np.random.default_rng(5).normal(size=(8, 8)), jnp.float32)
    params = {"w": jnp.zeros((8, 8))}
    state = tx.init(params)
    loss = jax.jit(lambda p: jnp.sum((p["w"] - target) ** 2))
    update = jax.jit(tx.update)
    first = loss(params)
    for _ in range(40):
        updates, state = update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert loss(params) < 0.1 * first
