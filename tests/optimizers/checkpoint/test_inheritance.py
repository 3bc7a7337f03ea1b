"""Test states restored for other blocks, parameters and options."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from optimizing import by_block, gradients, inherited, optimizer, train, zeros

from shampax.optimizers import ShampooOptions
from shampax.optimizers.plan import patterns

SHAPES = {"bias": (24,), "conv": (3, 3, 4, 8), "stack": (2, 24, 40), "w": (24, 40)}
NAMES = {"bias": ("x",), "conv": (None,) * 4, "stack": ("layers", "x", "y"), "w": ("x", "y")}
OPTIONS = ShampooOptions(block_size=16, interval=2, early_intervals=(), exponent=0.5, ridge=1e-4, solver="eigh")


def setting(options, shapes=SHAPES):
    names = {k: NAMES.get(k, (None,) * len(shape)) for k, shape in shapes.items()}
    return optimizer(options, names=names), names


def state_of(options, shapes=SHAPES, *, steps=3):
    """Return (optimizer, manifest, state) after some steps. Gradients of a parameter do not depend on the others."""
    tx, names = setting(options, shapes)
    stream = [{k: gradients(steps, {k: shape})[i][k] for k, shape in shapes.items()} for i in range(steps)]
    state = train(options, stream, names=names).states[-1]
    return tx, tx.layout(zeros(shapes)).manifest(), jax.tree.map(np.asarray, state)


def report_of(tx, shapes, manifest, saved, renamed=lambda path: path):
    arrays = {name: x.shape for name, x in zip(patterns.paths(saved), jax.tree.leaves(saved), strict=True)}
    return tx.layout(zeros(shapes)).inheritance(json.loads(json.dumps(manifest)), arrays, renamed).report()


def assert_same(x, y):
    jax.tree.map(np.testing.assert_array_equal, x, y)


@pytest.mark.parametrize(
    "block_size", [12, 16, pytest.param(8, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow)]
)
def test_elements_keep_momentum_and_second_moment_in_blocks_of_any_size(block_size):
    """Faults: an element gets the momentum of another; statistics of old blocks are used."""
    _, manifest, saved = state_of(OPTIONS)
    other = dataclasses.replace(OPTIONS, block_size=block_size)
    tx, _, own = state_of(other)
    taken = inherited(tx, zeros(SHAPES), manifest, saved)
    assert int(taken.count) == 3
    mine, theirs = by_block(tx, zeros(SHAPES), taken), by_block(tx, zeros(SHAPES), own)
    report = report_of(tx, SHAPES, manifest, saved)
    assert len(mine) == len(theirs) > 3
    for block, state in mine.items():
        # The momentum of an element does not depend on the blocks.
        assert_same(state.moments, theirs[block].moments)
        same_cut = not report[block[0]]["statistics"]
        if same_cut:
            assert_same(state, by_block(setting(OPTIONS)[0], zeros(SHAPES), saved)[block])
        else:
            assert not any(map(np.any, state.roots.statistics)) and state.roots.refreshed == 0
    assert_same(taken.diagonal, own.diagonal)
    whys = {path: fate["statistics"] for path, fate in report.items() if "statistics" in fate}
    if block_size == 16:
        assert not any(whys.values())
        assert_same(taken.buckets, saved.buckets)
    else:
        assert "there" in whys["w"]


def test_added_removed_and_renamed_parameters_do_not_change_others():
    """Fault: blocks are identified by their number, which changes with the other parameters of a bucket."""
    _, manifest, saved = state_of(OPTIONS)
    shapes = {"a_new": (16, 16), "bias": (24,), "deep/stack": (2, 24, 40), "w": (24, 40)}
    names = {"deep/stack": NAMES["stack"]}
    params = {"a_new": np.zeros((16, 16), np.float32), "bias": np.zeros(24, np.float32)} | {
        "deep": {"stack": np.zeros((2, 24, 40), np.float32)},
        "w": np.zeros((24, 40), np.float32),
    }
    axes = {"a_new": (None, None), "bias": ("x",), "deep": {"stack": names["deep/stack"]}, "w": ("x", "y")}
    tx = optimizer(OPTIONS, names=axes)
    renamed = {"stack": "deep/stack", "conv": "conv"}
    taken = inherited(tx, params, manifest, saved, lambda path: renamed.get(path, path))
    before = by_block(setting(OPTIONS)[0], zeros(SHAPES), saved)
    after = by_block(tx, params, taken)
    assert {path for path, _ in after} == {"a_new", "deep/stack", "w"}
    for (path, number), state in after.items():
        if path == "a_new":
            assert not any(map(np.any, jax.tree.leaves((state.moments, state.roots._replace(scale_log2=0)))))
        else:
            assert_same(state, before[path.removeprefix("deep/"), number])
    assert_same(taken.diagonal["bias"], saved.diagonal["bias"])
    arrays = {name: x.shape for name, x in zip(patterns.paths(saved), jax.tree.leaves(saved), strict=True)}
    report = tx.layout(params).inheritance(manifest, arrays, lambda path: renamed.get(path, path)).report()
    assert set(report["a_new"].values()) == {"not saved"}
    assert not any(report["deep/stack"].values()) and not any(report["w"].values())
    assert shapes.keys() == report.keys()


@pytest.mark.parametrize(
    ("changes", "fresh"),
    [
        ({"ridge": 1e-6}, {"roots"}),
        ({"exponent": 0.25}, {"roots"}),
        ({"beta2": 0.9}, set()),
        (
            {"beta2": 1.0, "graft": "adagrad", "diagonal": "adagrad"},
            {"statistics", "roots", "momentum", "second moment"},
        ),
        ({"graft": "rmsprop"}, {"momentum", "second moment"}),
        ({"diagonal": "rmsprop", "diagonal_beta1": 0.0, "diagonal_beta2": 0.9}, set()),
        ({"diagonal": "rmsprop", "treatments": ((".*", "diagonal"),)}, {"momentum", "second moment"}),
        ({"momentum": "heavy_ball"}, {"momentum", "second moment"}),
        ({"treatments": ((".*", "one_sided"),)}, {"statistics", "roots"}),
        ({"treatments": ((".*", "diagonal"),)}, set()),
        ({"view": "tensor"}, {"statistics", "roots"}),
        ({"refresh": "host", "interval": 5}, set()),
        ({"interval": 5}, set()),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_state_whose_meaning_changes_with_an_option_is_initialised(changes, fresh):
    """Faults: a sum is read as an average; roots are of another power; state is lost without need."""
    _, manifest, saved = state_of(OPTIONS)
    tx, _ = setting(dataclasses.replace(OPTIONS, **changes))
    fate = report_of(tx, SHAPES, manifest, saved)["conv"]
    assert {part for part, why in fate.items() if why} == fresh
    taken = inherited(tx, zeros(SHAPES), manifest, saved)
    blocks = by_block(tx, zeros(SHAPES), taken)
    if ("conv", 0) not in blocks:
        assert np.any(taken.diagonal["conv"].second_moment) == np.any(taken.diagonal["conv"].momentum) == (not fresh)
        return
    state = blocks["conv", 0]
    kept = {
        "momentum": state.moments.momentum,
        "second moment": state.moments.second_moment,
        "statistics": state.roots.statistics[0],
        "roots": state.roots.roots[0],
    }
    assert {part for part, x in kept.items() if not np.any(x)} == fresh


@pytest.mark.parametrize(("changes", "fresh"), [({"graft": "rmsprop"}, ""), ({"diagonal": "rmsprop"}, "adam there")])
def test_diagonal_parameters_lose_their_moments_only_if_their_method_changes(changes, fresh):
    """Faults: a second moment is that of another method; a change of the graft drops what it does not touch."""
    saved = setting(OPTIONS)[0].layout(zeros(SHAPES))
    tx, _ = setting(dataclasses.replace(OPTIONS, **changes))
    fates = report_of(tx, SHAPES, saved.manifest(), jax.eval_shape(saved.initial))["bias"]
    assert fates.keys() == {"momentum", "second moment"}
    assert all(why.startswith(fresh) and bool(why) == bool(fresh) for why in fates.values())


def test_diagonal_moments_move_into_blocks():
    options = dataclasses.replace(OPTIONS, treatments=((".*", "diagonal"),))
    _, manifest, saved = state_of(options)
    tx, _, own = state_of(OPTIONS)
    taken = by_block(tx, zeros(SHAPES), inherited(tx, zeros(SHAPES), manifest, saved))
    for block, state in by_block(tx, zeros(SHAPES), own).items():
        assert_same(taken[block].moments, state.moments)


def test_roots_in_flight_are_dropped_if_the_schedule_changes():
    """Fault: more statistics return at once than fit in a parcel."""
    _, manifest, saved = state_of(OPTIONS)
    host = dataclasses.replace(OPTIONS, refresh="host", interval=4)
    tx, _ = setting(host)
    flying = inherited(tx, zeros(SHAPES), manifest, saved)
    for bucket in flying.buckets.values():
        bucket.in_flight.stamp[:] = 3
    manifest = tx.layout(zeros(SHAPES)).manifest()
    again = inherited(tx, zeros(SHAPES), manifest, flying)
    assert all((bucket.in_flight.stamp == 3).all() for bucket in again.buckets.values())
    fewer = {k: shape for k, shape in SHAPES.items() if k != "conv"}
    for options, shapes in ((dataclasses.replace(host, interval=5), SHAPES), (host, fewer)):
        tx, _ = setting(options, shapes)
        moved = inherited(tx, zeros(shapes), manifest, flying)
        assert not any(bucket.in_flight.stamp.any() for bucket in moved.buckets.values())
        arrays = {name: x.shape for name, x in zip(patterns.paths(flying), jax.tree.leaves(flying), strict=True)}
        assert "dropped" in tx.layout(zeros(shapes)).inheritance(manifest, arrays).notes()[0]


# Changes on resume, as (options before, options after, shapes before). All rows of the table in docs/checkpoints.md.
CHANGED = ShampooOptions(block_size=16, interval=4, early_intervals=(), ridge=1e-4)
ALL = {"bias": (24,), "w": (24, 40)}


def changed(**options):
    return dataclasses.replace(CHANGED, **options)


def treated(kind):
    return changed(treatments=((".*", kind),))


CHANGES = {
    "another graft": (changed(graft="rmsprop"), CHANGED, ALL),
    "another diagonal method": (changed(diagonal="rmsprop", diagonal_rate=0.1), CHANGED, ALL),
    "no momentum of diagonal parameters before": (changed(diagonal_beta1=0.0), CHANGED, ALL),
    "a new parameter": (CHANGED, CHANGED, {"bias": (24,)}),
    "shampoo to soap": (CHANGED, treated("soap"), ALL),
    "soap to shampoo": (treated("soap"), CHANGED, ALL),
    "diagonal to shampoo": (treated("diagonal"), CHANGED, ALL),
    "kl_shampoo to shampoo": (treated("kl_shampoo"), CHANGED, ALL),
    "muon to shampoo": (treated("muon"), CHANGED, ALL),
    "another momentum": (changed(momentum="heavy_ball"), CHANGED, ALL),
    "no momentum before": (changed(beta1=0.0), CHANGED, ALL),
    "another exponent": (changed(exponent=0.25), CHANGED, ALL),
    "another block size": (changed(block_size=8), CHANGED, ALL),
    "a sum before": (changed(graft="adagrad", diagonal="adagrad", beta2=1.0), CHANGED, ALL),
    "another shape": (CHANGED, CHANGED, {"bias": (24,), "w": (24, 32)}),
}
FAST = ("another graft", "another diagonal method", "a new parameter", "shampoo to soap")


@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in FAST else pytest.mark.slow) for x in CHANGES])
def test_updates_after_a_change_are_no_longer_than_those_of_a_new_run(name):
    """Faults: a momentum meets a second moment of zero, so that updates are a thousand times too long; what is
    initialised has the age of the run, so that its bias is not corrected and updates are too short."""
    before, after, shapes = CHANGES[name]
    old = optimizer(before)
    saved = jax.tree.map(np.asarray, train(before, gradients(30, shapes)).states[-1])
    new, later = optimizer(after), gradients(20, ALL, seed=1)
    manifest = old.layout(zeros(shapes)).manifest()
    taken, fates = inherited(new, zeros(ALL), manifest, saved), report_of(new, ALL, manifest, saved)
    resumed, fresh = train(after, later, state=taken), train(after, later)
    for path in ALL:
        rms, usual = ([float(np.sqrt(np.mean(u[path] ** 2))) for u in run.updates] for run in (resumed, fresh))
        assert max(rms) <= 1.5 * max(usual), path
        assert rms[0] >= 0.9 * usual[0] or not fates[path]["momentum"], path
