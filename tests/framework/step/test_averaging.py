import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import toy
from step_bench import (
    NAN,
    SEED,
    Bench,
    assert_bitwise_equal,
    assert_same_on_all_devices,
    host,
    steps,
    with_bits_of_users,
)
from toy_runs import SHAMPOO, arrays, lines, make_config, two

from shampax.configs import base
from shampax.framework.base.errors import UserError
from shampax.framework.checkpoint import takeover
from shampax.framework.checkpoint.origin import Origin
from shampax.framework.config.check import check
from shampax.framework.loop import Run
from shampax.framework.planning.plan import make_plan
from shampax.framework.step import averaging
from shampax.framework.train import train
from shampax.launch import checkpoint
from shampax.optimizers import ShampooOptions
from shampax.optimizers.baselines import AdamWOptions
from shampax.optimizers.checkpoint.inheritance import Kept

EMA = 0.8
START = np.array([1.0, -2.0, 0.5])
CURVATURE = np.array([1.0, 0.3, 3.0])


def descend(decay, rate, count):
    """Return the averages from gradient descent on a quadratic, and the points of its gradients."""
    variables = {"params": jnp.asarray(START, jnp.float32), "count": jnp.int32(0)}
    current, averages, points = averaging.Averaging(variables, jnp.zeros(())), [], []
    for _ in range(count):
        at = current.iterate
        iterate = {"params": at["params"] * (1 - rate * jnp.float32(CURVATURE)), "count": at["count"] + 1}
        variables, current = averaging.advance(variables, current, iterate, decay)
        points.append(np.asarray(at["params"]))
        averages.append(np.asarray(variables["params"]))
    assert variables["count"] == count
    return np.array(averages), np.array(points)


def test_ema_equals_that_of_optax_and_does_not_change_the_descent():
    """Faults: the average starts at zero without correction; the start has weight; the gradient is of another point."""
    averages, points = descend(EMA, 0.1, 25)
    iterates = START * (1 - 0.1 * CURVATURE) ** np.arange(26)[:, None]
    np.testing.assert_allclose(points, iterates[:-1], rtol=1e-5)
    tx = optax.ema(EMA, debias=True)
    state = tx.init(jnp.zeros(3))
    for average, iterate in zip(averages, iterates[1:], strict=True):
        expected, state = tx.update(jnp.asarray(iterate, jnp.float32), state)
        np.testing.assert_allclose(average, expected, rtol=1e-5)
    weights = EMA ** np.arange(25)[::-1]
    np.testing.assert_allclose(averages[-1], weights @ iterates[1:] / weights.sum(), rtol=1e-5)


OPTIMIZERS = {"adamw": AdamWOptions(), "shampoo": ShampooOptions(block_size=8, interval=3, early_intervals=())}


@functools.cache
def bench(name, devices=2):
    task = toy.ToyTask(nan_steps=NAN[:2], seed=SEED)
    return Bench({"fsdp": devices}, task=task, options=OPTIMIZERS[name], ema_decay=EMA)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bad_steps_do_not_change_the_average(name):
    """Fault: a skipped step changes the average, the iterate or the weights, or counts in them."""
    count, bad = 12, NAN[:2]
    whole, metrics = steps(bench(name), count)
    assert metrics["skipped"][-1] == len(bad)
    assert_same_on_all_devices(whole)
    without, _ = steps(bench(name), count, without=bad)
    for part in ("params", "opt_state", "model_state", "averaging"):
        assert_bitwise_equal(getattr(whole, part), getattr(without, part))
    apart = [(x != z).any() for x, z in zip(*map(jax.tree.leaves, (whole.params, parameters(whole))), strict=True)]
    assert all(apart)
    assert int(whole.averaging.iterate["counters"]["batches"]) == int(whole.model_state["counters"]["batches"])


def parameters(state):
    """Return the iterate."""
    return state.averaging.iterate["params"]


def test_the_average_is_sharded_like_the_parameters_and_equal_on_other_devices():
    """Faults: the iterate is replicated; each device has its own average."""
    states = [steps(bench("adamw", devices), 4)[0] for devices in (2, 1)]
    for average, iterate in zip(*map(jax.tree.leaves, (states[0].params, parameters(states[0]))), strict=True):
        assert average.sharding.spec == iterate.sharding.spec
    assert any(parameters(states[0])["embed"]["kernel"].sharding.spec)
    for part in ("params", "averaging"):
        pair = [jax.tree.leaves(host(getattr(state, part))) for state in states]
        for ours, theirs in zip(*pair, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_an_ema_does_not_change_training():
    """Fault: a loss or an update is that of the average."""
    plain, averaged = (with_bits_of_users(Bench({"data": 1}, ema_decay=decay)) for decay in (0.0, EMA))
    (end, metrics), (other, measured) = (steps(each, 6) for each in (plain, averaged))
    np.testing.assert_array_equal(metrics["loss"], measured["loss"])
    assert_bitwise_equal(end.params, parameters(other))
    assert_bitwise_equal(end.opt_state, other.opt_state)


def averaged_config(**changes):
    optimizer = base.component(SHAMPOO, block_size=8, interval=3, refresh="host", delay=1)
    return make_config(optimizer=optimizer, **{"ema_decay": 0.9} | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train 12 steps with roots on the host and an average."""
    workdir = tmp_path_factory.mktemp("averaging") / "run"
    return workdir, train(averaged_config(), workdir, devices=two())


def heldout_loss(params):
    source = toy.ToySource(20, 2)
    batch = {name: np.stack([source[i][name] for i in range(20)]) for name in source[0]}
    loss, _ = toy.ToyTask().loss({"params": params, "counters": {"batches": 0}}, batch, key=None, train=False)
    return float(loss)


def test_the_average_is_evaluated_and_exported(run, tmp_path, capsys):
    """Fault: the held-out loss or the exported parameters are of the iterate."""
    workdir, result = run
    saved = arrays(workdir, 12)
    assert result["heldout_loss"] == pytest.approx(heldout_loss(saved["params"]), rel=1e-5)
    assert abs(heldout_loss(saved["averaging"]["iterate"]["params"]) - result["heldout_loss"]) > 1e-3
    assert checkpoint.main(["export", str(workdir), str(tmp_path / "a.safetensors")]) == 0
    exported = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert set(exported) == {"embed.kernel", "hidden.kernel", "out.kernel"}
    np.testing.assert_array_equal(exported["hidden.kernel"], saved["params"]["hidden"]["kernel"])
    assert checkpoint.main(["verify", str(workdir)]) == 0
    assert checkpoint.main(["inspect", str(workdir)]) == 0
    assert re.search(r"averaging +5 +5,128", capsys.readouterr().out)


def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(run, tmp_path, monkeypatch):
    """Fault: a checkpoint lacks the iterate or a weight."""
    whole, _ = run
    monkeypatch.setattr(Run, "signal", lambda self: "SIGINT" if self.step == 6 else None)
    train(averaged_config(), tmp_path, devices=two())
    monkeypatch.undo()
    train(averaged_config(), tmp_path, devices=two())
    assert lines(tmp_path) == lines(whole)
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path, 12), arrays(whole, 12))


@pytest.mark.slow
def test_an_average_can_be_turned_on_and_off_with_a_message(run, tmp_path):
    """Faults: a new average starts at random parameters; an average is dropped without a message."""
    whole, _ = run
    plain = tmp_path / "plain"
    train(averaged_config(**{"ema_decay": 0.0, "resume_from": str(whole)}), plain, devices=two())
    assert "the parameters are the average of that run; its iterate is dropped" in report(plain)
    jax.tree.map(np.testing.assert_array_equal, arrays(plain, 12)["params"], arrays(whole, 12)["params"])
    assert "averaging" not in {name for name, tree in arrays(plain, 12).items() if jax.tree.leaves(tree)}

    again = tmp_path / "again"
    mesh = {"mesh.data": 1, "mesh.fsdp": 2}
    train(averaged_config(resume_from=str(plain), **mesh), again, devices=two())
    assert "the average starts at the parameters" in report(again)
    assert "taken over with all their state: 3 of 3" in report(again)
    assert "averaging/weight: initialised (not saved)" in report(again)
    begun = arrays(again, 12)
    assert_bitwise_equal(begun["params"], begun["averaging"]["iterate"]["params"])
    assert_bitwise_equal(begun["params"], arrays(plain, 12)["params"])


def test_init_from_takes_the_average_of_a_run(run):
    """Fault: a new run starts with the model of another run and with its iterate."""
    workdir, _ = run
    begun = Bench({"data": 1}, ema_decay=EMA)
    origin = Origin("init", workdir / "checkpoints" / "12")
    taken = takeover.plan(origin, begun.abstract, begun.tx, SHAMPOO, ())
    for kernel in ("params/hidden/kernel", "params/out/kernel"):
        assert taken.sources[kernel] == taken.sources[f"averaging/iterate/{kernel}"] == Kept(kernel)
    assert not taken.lines
    assert "averaging/weight" in taken.fresh


def report(workdir):
    return (workdir / "restored.txt").read_text()


def test_a_plan_counts_the_iterate():
    """Fault: the plan says that twice the parameters fit."""
    found = make_plan(specified(averaged_config()), two()).bytes
    without = make_plan(specified(averaged_config(**{"ema_decay": 0.0})), two()).bytes
    assert "average" not in without
    # Parameters, one count, one weight.
    assert found["average"] == found["parameters"] + 4 + 4


def specified(config):
    config.unlock()
    config.data = base.component("toy_specified:SpecifiedData")
    return config.lock()


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    """Fault: an average that never changes or is NaN is found at the end of the run."""
    with pytest.raises(UserError, match=re.escape(f"config.ema_decay={decay}: ")):
        check(make_config(ema_decay=decay))


def test_without_an_average_there_is_no_state():
    """Fault: the default uses memory or changes checkpoints."""
    assert base.get_config().ema_decay == 0
    assert not jax.tree.leaves(Bench({"data": 1}).abstract.averaging)
