"""Test properties of the optimizer on small problems with known answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizing import (
    FAMILY_OPTIONS,
    FAMILY_PARAMETERS,
    FAMILY_SHAPES,
    LAYOUTS,
    PLAIN,
    SHARDED_SHAPES,
    SIBLINGS,
    by_block,
    family_layout,
    gradients,
    inherited,
    optimizer,
    sharded_options,
    train,
    zeros,
)

from shampax.optimizers import ShampooOptions, distributed_shampoo
from shampax.optimizers.diagonal import GRAFTS


def plain(**options):
    """Return options without orthogonalizing, where a formula in closed form is known."""
    return ShampooOptions(**PLAIN | options)


def norm(x):
    return np.linalg.norm(np.asarray(x, np.float64))


def cosine(x, y):
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    return np.sum(x * y) / norm(x) / norm(y)


def distance(x, y):
    """Return the distance relative to y."""
    return norm(np.asarray(x, np.float64) - np.asarray(y, np.float64)) / norm(y)


# Directions


def test_a_low_rank_signal_is_not_lost_in_noise():
    """Fault: an absolute epsilon, a cut without effect, or roots refused because a gradient is nearly singular. Then
    noise directions, whose roots are largest, dominate the update."""
    random = np.random.default_rng(0)
    left, right = (np.linalg.qr(random.normal(size=(n, 4)))[0] for n in (64, 32))
    stream = []
    for _ in range(100):
        signal = 8 * left @ random.normal(size=(4, 4)) @ right.T
        g = (signal + 1e-4 * random.normal(size=(64, 32))).astype(np.float32)
        stream.append({"half": g, "quarter": g})
    treatments = (("half", "shampoo exponent=0.5"), ("quarter", "shampoo exponent=0.25"))
    run = train(
        plain(solver="eigh", interval=10, phases=1, early_intervals=(), ridge=0.0, cut=1e-4, treatments=treatments),
        stream,
    )
    for t, updates in enumerate(run.updates):
        for name, update in updates.items():
            inside = left @ (left.T @ update @ right) @ right.T
            assert t < 2 or norm(update - inside) ** 2 <= 1e-3 * norm(update) ** 2, name


def test_a_constant_gradient_gives_the_polar_factor():
    """Faults: wrong exponents or sides; statistics drift; roots amplify their rounding. Without ridge, L^(-1/4) G
    R^(-1/4) = (G G')^(-1/2) G = U V' for G = U S V' as long as G is constant."""
    random = np.random.default_rng(3)
    square, wide = random.normal(size=(24, 24)) + 8 * np.eye(24), random.normal(size=(12, 24))
    stream = [{"square": square.astype(np.float32), "wide": wide.astype(np.float32)}] * 50
    treatments = (("square", "shampoo exponent=0.25"), ("wide", "one_sided exponent=0.5"))
    run = train(plain(interval=1, ridge=0.0, graft="none", treatments=treatments), stream)
    for name in stream[0]:
        u, _, vt = np.linalg.svd(stream[0][name].astype(np.float64), full_matrices=False)
        for t in (1, 2, 10, 49):
            np.testing.assert_allclose(-run.updates[t][name], u @ vt, atol=1e-4)


# Grafting. `weight` is one block, whose first root is made on step 1 from a single gradient; `wide` is three blocks,
# whose first roots are made on steps 2, 3 and 4.

GRAFTED = {"diagonal": (8, 6), "weight": (8, 6), "wide": (24, 6), "momentum": (8, 7)}
GRAFTED_TREATMENTS = (
    ("diagonal", "diagonal"),
    ("weight|wide", "shampoo exponent=0.5"),
    ("momentum", "shampoo exponent=0"),
)


def grafted_options(graft, beta1=0.9):
    return plain(
        graft=graft,
        diagonal="sgd" if graft == "none" else graft,
        beta1=beta1,
        epsilon=1e-12,
        interval=10,
        early_intervals=(),
        ridge=1e-6,
        refresh="host",  # compiles twice as fast
        delay=0,
        block_size=8,
        treatments=GRAFTED_TREATMENTS,
    )


@functools.cache
def grafted(graft):
    return train(grafted_options(graft), gradients(50, GRAFTED))


def product(momentum, scale):
    """Return the momentum instead of the gradient, for an optax transformation to scale."""

    def update(g, state, params=None):
        m, first = momentum.update(g, state[0])
        scaled, second = scale.update(g, state[1])
        return jax.tree.map(lambda m, s, g: m * s / g, m, scaled, g), (first, second)

    return optax.GradientTransformation(lambda g: (momentum.init(g), scale.init(g)), update)


EMA = optax.ema(0.9)
TWINS = {
    "none": EMA,
    "sgd": EMA,
    "adam": optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-12),
    "rmsprop": product(EMA, optax.scale_by_rms(decay=0.99, eps=1e-12, bias_correction=True)),
    "adagrad": product(EMA, optax.scale_by_rss(initial_accumulator_value=0.0, eps=0.0)),
}
NORMALIZED = [graft for graft in GRAFTS if graft.endswith("_normalized")]
NORMALIZE = optax.normalize_by_update_norm(eps=0.0)
TWINS |= {f"{graft}_normalized": optax.chain(NORMALIZE, twin) for graft, twin in TWINS.items()}


def follow(twin, stream):
    """Return the directions of an optax transformation, on each parameter separately."""

    @jax.jit
    def step(grads, states):
        pairs = {k: twin.update(g, states[k]) for k, g in grads.items()}
        return {k: u for k, (u, _) in pairs.items()}, {k: s for k, (_, s) in pairs.items()}

    states, directions = {k: twin.init(g) for k, g in stream[0].items()}, []
    for grads in stream:
        direction, states = step(grads, states)
        directions.append(jax.tree.map(np.asarray, direction))
    return directions


@functools.cache
def graft_twin(graft):
    return follow(TWINS[graft], gradients(50, GRAFTED))


@pytest.mark.parametrize("graft", GRAFTS)
def test_grafts_equal_optax_methods(graft):
    """Faults: a graft differs from the method, on diagonal parameters, as the norm of an update, or as the direction of
    blocks without a root; with exponent 0 the direction is not that of the momentum."""
    twin = graft_twin(graft)
    momentum = graft_twin("sgd_normalized" if graft in NORMALIZED else "sgd")
    for t, update in enumerate(grafted(graft).updates[:20]):
        assert distance(-update["diagonal"], twin[t]["diagonal"]) <= 1e-6
        assert cosine(-update["momentum"], momentum[t]["momentum"]) >= 1 - 1e-6
        rootless = {"weight": slice(8 * min(t, 1), 8), "wide": slice(8 * min(max(t - 1, 0), 3), 24)}
        for name, rows in rootless.items():
            if rows.start < rows.stop:
                assert distance(-update[name][rows], twin[t][name][rows]) <= 1e-6
            else:
                assert abs(cosine(update[name], twin[t][name])) < 0.995
        if graft != "none":
            for name in ("weight", "wide", "momentum"):
                assert abs(norm(update[name]) / norm(twin[t][name]) - 1) <= 1e-6


@pytest.mark.parametrize("graft", GRAFTS)
def test_stale_roots_do_not_blow_up_updates(graft):
    """Fault: a root of few gradients has not seen a direction, and the graft lets its large update through.

    From the second refresh on, the largest update is at most ten times the median; before, when only `weight` has a
    root (of one gradient, used for ten steps), it is no further from it than the method's own.
    """
    run, twin = grafted(graft), graft_twin(graft)
    for name in ("weight", "wide"):
        norms, own = (np.array([norm(u[name]) for u in updates]) for updates in (run.updates, twin))
        if graft == "none":
            assert name == "wide" or norms[1:].max() > 10 * np.median(norms[1:])
        else:
            assert norms[11:].max() <= 10 * np.median(norms[11:])
            assert norms[1:].max() / np.median(norms[1:]) <= 1.001 * own[1:].max() / np.median(own[1:])


@pytest.mark.parametrize(
    ("twin", "options"),
    [
        (optax.scale_by_rms(decay=0.99, eps=1e-8, bias_correction=True), {"diagonal": "rmsprop", "beta1": 0.0}),
        (optax.scale_by_rss(0.0, eps=1e-8), {"diagonal": "adagrad", "beta1": 0.0}),
        (optax.identity(), {"diagonal": "sgd", "diagonal_beta1": 0.0}),
        (optax.trace(0.9), {"diagonal": "sgd", "momentum": "heavy_ball", "beta1": 0.5, "diagonal_beta1": 0.9}),
        (optax.trace(0.9, nesterov=True), {"diagonal": "sgd", "momentum": "heavy_ball", "nesterov": True}),
        (optax.adam(-2.0, 0.8, 0.95), {"diagonal_beta1": 0.8, "diagonal_beta2": 0.95, "diagonal_rate": 2.0}),
        (optax.adam(-1.0, 0.9, 0.99), {"graft": "none", "nesterov": True, "diagonal_nesterov": False}),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_momentum_without_roots_equals_optax(twin, options):
    """Fault: a diagonal parameter differs from the method, for any kind of momentum."""
    stream = gradients(20, {"w": (8, 6)})
    run = train(plain(treatments=((".*", "diagonal"),), **options), stream)
    for update, wanted in zip(run.updates, follow(twin, stream), strict=True):
        assert distance(-update["w"], wanted["w"]) <= 1e-6


# Scale


@functools.cache
def scaled(graft, beta1, k):
    stream = gradients(50, GRAFTED)[:12]
    stream = [{name: g * np.float32(2.0**k) for name, g in grads.items()} for grads in stream]
    return train(grafted_options(graft, beta1), stream).updates[-1]


@pytest.mark.parametrize("name", GRAFTED)
@pytest.mark.parametrize(
    ("graft", "beta1"),
    [
        *((graft, 0.9) for graft in GRAFTS),
        *(pytest.param(graft, 0.0, marks=() if graft in ("adam", "none") else pytest.mark.slow) for graft in GRAFTS),
    ],
)
def test_the_scale_of_gradients_does_not_change_directions(graft, beta1, name):
    """Fault: statistics, roots or norms have an absolute epsilon or tolerance.

    Under diagonal treatment adam, rmsprop and adagrad have an absolute epsilon, which small gradients meet.
    """
    wanted = scaled(graft, beta1, 0)
    for k in (-60, -30, 30, 60):
        if name != "diagonal" or k > 0 or graft not in ("adam", "rmsprop", "adagrad"):
            assert cosine(scaled(graft, beta1, k)[name], wanted[name]) >= 1 - 1e-6, k


def test_orthogonalized_updates_do_not_depend_on_the_gradients_scale():
    """Fault: an orthogonal direction is taken for one in the units of the gradient or of the roots."""
    stream = gradients(4, {"w": (8, 6)})
    chosen = plain(block_size=8, interval=2, orthogonalize=3, graft="none")
    wanted = train(chosen, stream).updates[-1]["w"]
    for k in (-20, 20):
        found = train(chosen, [{"w": g["w"] * np.float32(2.0**k)} for g in stream]).updates[-1]["w"]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("graft", ["none", "sgd", "adagrad_normalized"])
def test_large_parameters_at_every_scale(graft):
    """Fault: sums of squares overflow or underflow although single squares do not."""
    options = plain(graft=graft, interval=1, exponent=0.25, ridge=1e-4, solver="eigh")
    stream = gradients(3, {"w": (40, 40)})
    runs = [train(options, [{"w": g["w"] * np.float32(2.0**k)} for g in stream]) for k in (0, -60, 60)]
    for run in runs[1:]:
        assert cosine(run.updates[-1]["w"], runs[0].updates[-1]["w"]) >= 1 - 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"graft": "adam", "solver": "newton"},
        {"graft": "adagrad_normalized", "solver": "eigh", "beta1": 0.0},
        {"graft": "none", "solver": "eigh", "beta1": 0.0, "ridge": 0.0, "cut": 1e-4},
    ],
    ids=str,
)
def test_zero_gradients_move_nothing(options):
    """Faults: 0/0 in norms, roots or grafting; a refresh of zeros counts as failed; a zero parameter or block changes
    others."""
    shapes = {"moving": (16, 24), "still": (16, 24), "half": (32, 24), "bias": (8,)}
    stream = gradients(5, shapes)
    silent = [g | {"still": np.zeros_like(g["still"]), "bias": np.zeros_like(g["bias"])} for g in stream]
    silent = [g | {"half": np.where(np.arange(32)[:, None] < 16, g["half"], 0)} for g in silent]
    if options.get("beta1") == 0:
        silent[4] = jax.tree.map(np.zeros_like, silent[4])
    options = plain(**({"interval": 1, "exponent": 0.5, "ridge": 1e-4, "block_size": 24} | options))
    run, both = train(options, silent), train(options, stream)
    for t, update in enumerate(run.updates):
        assert not np.any(update["still"]) and not np.any(update["bias"]) and not np.any(update["half"][16:])
        assert np.any(update["half"][:16]) or t == 4
        if t < 4:
            np.testing.assert_array_equal(update["moving"], both.updates[t]["moving"])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(run.states[-1]))
    for bucket in run.states[-1].buckets.values():
        assert not np.any(bucket.roots.failures)


def test_gradients_of_zero_everywhere():
    """Fault: a run cannot start with zero gradients: zero updates, then the same run as without them."""
    options = grafted_options("sgd")
    stream = [jax.tree.map(np.zeros_like, grads) for grads in gradients(2, GRAFTED)]
    run = train(options, stream)
    assert all(not np.any(u) for updates in run.updates for u in updates.values())
    assert int(run.states[-1].count) == 2 and int(run.states[-1].skipped) == 0


# Padding and blocks


def held(x, shape):
    """Return the matrix of x with folded leading axes, padded with zeros below and to the right."""
    x = x.reshape(-1, x.shape[-1])
    return np.pad(x, [(0, whole - part) for whole, part in zip(shape, x.shape, strict=True)])


BLOCKED = {"odd": (65, 33), "even": (96, 80), "conv": (3, 3, 16, 32), "vector": (5000,), "scalar": (), "empty": (0, 4)}
# Block size -> shape that holds each matrix, padded with zeros, in blocks that need no padding.
UNPADDED = {
    32: {"odd": (66, 34), "even": (96, 81), "conv": (145, 32)},
    64: {"odd": (68, 34), "even": (96, 80)},
    128: {"odd": (68, 34), "even": (96, 80)},
}


@pytest.mark.parametrize(
    ("block_size", "kind"),
    # KL-Shampoo divides statistics by lengths, so a row of zeros changes its result.
    [
        (32, "shampoo"),
        (64, "soap"),
        (64, "muon"),
        pytest.param(64, "shampoo", marks=pytest.mark.slow),
        pytest.param(128, "shampoo", marks=pytest.mark.slow),
    ],
)
def test_padding_changes_nothing_and_everything_trains(block_size, kind):
    """Faults: padding enters a norm, mean or root; axes of convolutions fold in another order; blocks are lost or
    joined in another order; a shape cannot train."""
    holders = UNPADDED[block_size]
    shapes = BLOCKED if block_size == 32 else {k: BLOCKED[k] for k in holders}
    options = plain(
        block_size=block_size,
        interval=2,
        phases=1,  # independent of the numbers of blocks
        solver="eigh",
        exponent=0.25,
        ridge=1e-4,
        treatments=((".*", kind),),
        start_step=0 if kind == "shampoo" else 5,  # eigenvectors of singular statistics are arbitrary
    )
    random = np.random.default_rng(1)
    start = params = {k: random.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    state = None
    for _ in range(8):
        grads = {k: (x + 0.1 * random.normal(size=x.shape)).astype(np.float32) for k, x in params.items()}
        grads |= {f"{k} held": held(grads[k], shape) for k, shape in holders.items()}
        (updates,), (state,) = train(options, [grads], state=state)
        for k, shape in holders.items():
            # The length of Muon's update depends on the sides of a block.
            within = {"shampoo": 1e-6, "soap": 1e-4, "muon": 2e-2}[kind]
            assert distance(updates[f"{k} held"], held(updates[k], shape)) <= within, k
        params = {k: x + 0.2 * updates[k] for k, x in params.items()}
    for k, x in params.items():
        assert x.size == 0 or norm(x) < (0.7 if kind == "shampoo" else 0.85) * norm(start[k]), k
    assert int(state.skipped) == 0


def test_blocks_are_like_separate_parameters():
    """Fault: blocks mix. Without grafting, a parameter of four blocks equals four parameters."""
    stream = gradients(5, {"w": (40, 48)})
    corners = {f"{i}x{j}": (slice(20 * i, 20 * i + 20), slice(24 * j, 24 * j + 24)) for i in (0, 1) for j in (0, 1)}
    parts = [{name: g["w"][corner] for name, corner in corners.items()} for g in stream]
    options = {
        "interval": 1, "exponent": 0.25, "ridge": 1e-4, "graft": "none", "refresh": "host", "delay": 0
    }  # fmt: skip
    whole = train(plain(block_size=24, **options), stream).updates[-1]["w"]
    alone = train(plain(**options), parts).updates[-1]
    for name, corner in corners.items():
        assert distance(whole[corner], alone[name]) <= 1e-6


def test_stacked_equals_separate():
    """Fault: norms or statistics mix scanned layers."""
    stacked = gradients(6, {"w": (3, 16, 24)})
    separate = [{f"w{i}": g["w"][i] for i in range(3)} for g in stacked]
    options = plain(interval=3, early_intervals=(), exponent=0.25, ridge=1e-4, refresh="host", delay=0)
    one = train(options, stacked, names={"w": ("layers", "embed", "mlp")})
    three = train(options, separate)
    for t in range(6):
        for i in range(3):
            np.testing.assert_allclose(one.updates[t]["w"][i], three.updates[t][f"w{i}"], rtol=1e-5, atol=1e-6)


# Meshes


def problem(kind):
    """Return (options, shapes, the kind's parameters). All kinds except Shampoo share one program."""
    if kind == "shampoo":
        return sharded_options(kind), SHARDED_SHAPES, tuple(SHARDED_SHAPES)
    return FAMILY_OPTIONS, FAMILY_SHAPES, FAMILY_PARAMETERS[kind]


def layout_of(name, kind):
    return LAYOUTS[name] if kind == "shampoo" else family_layout(name)


@functools.cache
def nine_steps(shared, layout):
    """Train Shampoo or its siblings for nine steps."""
    kind = SIBLINGS[0] if shared else "shampoo"
    options, shapes, _ = problem(kind)
    mesh, specs = layout_of(layout, kind)
    return train(options, gradients(9, shapes), mesh=mesh, specs=specs)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        pytest.param("replicated", "shampoo", marks=pytest.mark.slow),
        pytest.param("fsdp", "shampoo", marks=pytest.mark.slow),
        ("three devices", "shampoo"),
        ("fsdp x tensor", "shampoo"),
        *(("fsdp x tensor", kind) for kind in SIBLINGS),
    ],
)
def test_same_run_on_any_mesh(layout, kind):
    """Fault: owners, exchange or schedule depend on the number of devices or on the parameters' shardings."""
    mesh, specs = layout_of(layout, kind)
    options, shapes, own = problem(kind)
    alone, there = (nine_steps(kind != "shampoo", name) for name in ("one device", layout))
    for t in range(9):
        for k in own:
            assert distance(there.updates[t][k], alone.updates[t][k]) <= 2e-4, (t, k)
    for array in jax.tree.leaves(there.states[-1].buckets):
        assert array.addressable_shards[0].data.shape[0] * mesh.size == array.shape[0]
    here = by_block(optimizer(options), zeros(shapes), alone.states[-1])
    far = by_block(optimizer(options, mesh, specs=specs), zeros(shapes), there.states[-1])
    assert {k: (b.roots.refreshed, b.roots.refreshes) for k, b in here.items()} == {
        k: (b.roots.refreshed, b.roots.refreshes) for k, b in far.items()
    }


@functools.cache
def there_and_back(shared, old, new):
    """Return (state after five steps moved to another mesh, the run from there, the run after moving it back)."""
    kind = SIBLINGS[0] if shared else "shampoo"
    options, shapes, _ = problem(kind)
    params, stream = zeros(shapes), gradients(9, shapes)
    (old_mesh, old_specs), (new_mesh, new_specs) = layout_of(old, kind), layout_of(new, kind)
    txs = optimizer(options, old_mesh, specs=old_specs), optimizer(options, new_mesh, specs=new_specs)
    moved = inherited(txs[1], params, txs[0].layout(params).manifest(), nine_steps(shared, old).states[4])
    back = inherited(txs[0], params, txs[1].layout(params).manifest(), moved)
    return (
        moved,
        train(options, stream[5:], state=moved, mesh=new_mesh, specs=new_specs),
        train(options, stream[5:], state=back, mesh=old_mesh, specs=old_specs),
    )


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("three devices", "fsdp x tensor", "shampoo"),
        *(("fsdp x tensor", "one device", kind) for kind in SIBLINGS),
        pytest.param("fsdp", "three devices", "shampoo", marks=pytest.mark.slow),
        *(pytest.param("three devices", "fsdp x tensor", kind, marks=pytest.mark.slow) for kind in SIBLINGS),
    ],
)
def test_a_state_moves_to_another_mesh(old, new, kind):
    """Fault: a block is lost or moved to another position when the number of devices changes."""
    options, shapes, own = problem(kind)
    (old_mesh, old_specs), (new_mesh, new_specs) = layout_of(old, kind), layout_of(new, kind)
    txs = optimizer(options, old_mesh, specs=old_specs), optimizer(options, new_mesh, specs=new_specs)
    before, (moved, after, again) = nine_steps(kind != "shampoo", old), there_and_back(kind != "shampoo", old, new)

    pair = by_block(txs[0], zeros(shapes), before.states[4]), by_block(txs[1], zeros(shapes), moved)
    jax.tree.map(np.testing.assert_array_equal, *({k: b for k, b in blocks.items() if k[0] in own} for blocks in pair))
    jax.tree.map(np.testing.assert_array_equal, before.states[4].diagonal, moved.diagonal)
    assert (before.states[4].count, before.states[4].skipped) == (moved.count, moved.skipped)
    for stayed, here, returned in zip(before.updates[5:], after.updates, again.updates, strict=True):
        for k in own:
            assert distance(here[k], stayed[k]) <= 2e-4
            np.testing.assert_array_equal(returned[k], stayed[k])


# Schedules and diagnostics

EARLY = {"interval": 4, "early_intervals": ((4, 1), (12, 2))}
# (options, steps at which blocks of a phase get new roots)
SCHEDULES = {
    "staggered": ({"interval": 4, "early_intervals": ()}, lambda phase: range(phase + 1, 25, 4)),
    "early": (EARLY, lambda phase: [1, 2, 3, 4, *range(5 + phase // 2, 13, 2), *range(13 + phase, 25, 4)]),
    "one phase": ({"phases": 1} | EARLY, lambda phase: [1, 2, 3, 4, 5, 7, 9, 11, 13, 17, 21]),
    "late": (
        {"interval": 4, "early_intervals": (), "start_step": 10},
        lambda phase: [t for t in range(phase + 1, 25, 4) if t >= 6],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_roots_are_refreshed_as_scheduled(name):
    """Faults: a block waits longer than its interval; a refresh is not counted; roots are used too early."""
    shapes = {"v": (16, 8), "w": (24, 8)}
    changed, expected = SCHEDULES[name]
    options = plain(**{"block_size": 8, "solver": "eigh", "ridge": 1e-4, "graft": "sgd"} | changed)
    run, tx = train(options, gradients(24, shapes)), optimizer(options)
    (bucket,) = tx.layout(zeros(shapes)).plan.buckets
    diagnose = jax.jit(lambda state: state.layout.diagnostics(state))
    for t, state in enumerate(run.states, start=1):
        blocks = by_block(tx, zeros(shapes), state)
        due = {block: [s for s in expected(number * 4 // 5) if s <= t] for number, block in enumerate(blocks)}
        assert {block: b.roots.refreshed for block, b in blocks.items()} == {
            k: max(v, default=0) for k, v in due.items()
        }
        diagnostics = diagnose(state)
        assert diagnostics["refreshes"] == sum(map(len, due.values()))
        ages = [t - max(steps) for steps in due.values() if steps]
        assert diagnostics[f"{bucket.name}/staleness"] == pytest.approx(np.mean(ages) if ages else 0)
        acting = [t >= options.start_step and any(s < t for s in steps) for steps in due.values()]
        assert [bool(b.graft_ratio > 0) for b in blocks.values()] == acting


@pytest.mark.parametrize("solver", ["newton", pytest.param("eigh", marks=pytest.mark.slow)])
def test_diagnostics_of_a_known_case(solver):
    """Fault: a diagnostic measures something else than its name says."""
    options = plain(interval=1, exponent=0.25, ridge=0.01, beta1=0.0, graft="sgd", solver=solver, block_size=4)
    eigenvalues = np.array([64, 16, 4, 4])
    g = np.zeros((4, 8), np.float32)
    g[:, :4] = np.diag(np.sqrt(eigenvalues))  # includes a block of zeros
    run, tx = train(options, [{"w": g}] * 3), optimizer(options)
    (bucket,) = tx.layout({"w": g}).plan.buckets
    found = run.states[-1].layout.diagnostics(run.states[-1])
    diagnostics = {k.removeprefix(f"{bucket.name}/"): float(v) for k, v in found.items()}
    assert diagnostics.pop("residual") <= 1e-4
    by_roots = np.sqrt(eigenvalues) * (eigenvalues + 0.64) ** -0.5
    wanted = {
        "refreshes": 3,
        "skipped": 0,
        "condition": 64.64 / 4.64,
        "effective_rank": 88 / 64,
        "staleness": 0,
        "graft_ratio": norm(np.sqrt(eigenvalues)) / norm(by_roots),
        "failures": 0,
        "fallbacks": 0,
    }
    assert diagnostics == pytest.approx(wanted, rel=2e-3)
    layout = run.states[-1].layout
    names, layers = layout.diagnostics_by_layer(jax.device_get(layout.diagnostics_by_block(run.states[-1])))
    assert names == ["w"]
    assert {name: float(values[0]) for name, values in layers.items()} == pytest.approx(
        {name: wanted[name] for name in layers}, rel=2e-3
    )
    first = run.states[0].layout.diagnostics(run.states[0])
    assert first["refreshes"] == 1 and first[f"{bucket.name}/graft_ratio"] == 0


# Optax's contract


def test_weight_decay_needs_parameters():
    """Fault: decay is left out without an error."""
    tx = distributed_shampoo(0.01, plain(weight_decay=0.1))
    params = {"a": jnp.ones((8, 8))}
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))


SMALL = plain(interval=2, early_intervals=(), exponent=0.25, solver="eigh", graft="sgd", diagonal="sgd")


def descend(tx, steps):
    """Return losses before and after steps towards a target."""
    target = jnp.asarray(np.random.default_rng(5).normal(size=(8, 8)), jnp.float32)
    loss = jax.jit(jax.value_and_grad(lambda p: jnp.sum((p["w"] - target) ** 2)))
    params, update = {"w": jnp.zeros((8, 8))}, jax.jit(tx.update)
    state, first = tx.init(params), loss({"w": jnp.zeros((8, 8))})[0]
    for _ in range(steps):
        updates, state = update(loss(params)[1], state, params)
        params = optax.apply_updates(params, updates)
    return float(first), float(loss(params)[0])


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip_by_global_norm(10.0), distributed_shampoo(lambda step: 0.1 * 0.99**step, SMALL)),
        optax.MultiSteps(distributed_shampoo(0.1, SMALL), every_k_schedule=2),
        optax.inject_hyperparams(distributed_shampoo)(learning_rate=lambda step: 0.1 * 0.99**step, options=SMALL),
    ],
    ids=["chain", "MultiSteps", "inject_hyperparams"],
)
def test_composes_with_optax(tx):
    """Fault: optax cannot wrap the transformation, or its learning rate cannot be traced."""
    before, after = descend(tx, 60)
    assert after < 0.1 * before


def test_the_learning_rate_may_be_an_argument_of_the_step():
    """Fault: the rate is fixed at compilation."""
    grads = {"w": jnp.asarray(gradients(1, {"w": (8, 8)})[0]["w"])}

    @jax.jit
    def update(rate, state):
        return distributed_shampoo(rate, SMALL).update(grads, state)[0]["w"]

    state = optimizer(SMALL).init(grads)
    np.testing.assert_allclose(update(0.5, state), 5 * update(0.1, state), rtol=1e-6)


def test_bfloat16_gradients():
    """Fault: arithmetic is in bfloat16, or updates have another type than the gradients."""
    shapes = {"w": (8, 8), "bias": (8,)}
    rounded = [jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads) for grads in gradients(6, shapes)]
    low = train(SMALL, rounded)
    full = train(SMALL, [jax.tree.map(lambda g: g.astype(np.float32), grads) for grads in rounded])
    for t in range(6):
        for k in shapes:
            assert low.updates[t][k].dtype == jnp.bfloat16
            np.testing.assert_array_equal(low.updates[t][k], full.updates[t][k].astype(jnp.bfloat16))


@pytest.mark.parametrize("layout", ["one device", "fsdp"])
@pytest.mark.parametrize("shapes", [{}, {"bias": (64,), "scale": ()}], ids=["nothing", "vectors"])
def test_trees_without_matrices(layout, shapes):
    """Fault: the optimizer needs a bucket."""
    mesh, _ = LAYOUTS[layout]
    params = {k: jnp.ones(s) for k, s in shapes.items()}
    tx = optimizer(plain(beta1=0.0, diagonal="sgd"), mesh)
    updates, state = jax.jit(tx.update)(params, tx.init(params))
    jax.tree.map(lambda u, p: np.testing.assert_array_equal(u, -p), updates, params)
    assert int(state.count) == 1 and float(state.layout.diagnostics(state)["refreshes"]) == 0
