import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import toy
from step_bench import NAN, SEED, SKIP, SPIKE, Bench, assert_bitwise_equal, assert_same_on_all_devices, host, steps
from toy_runs import SHAMPOO, arrays, lines, make_config, two

from shampax.configs import base
from shampax.framework.base.errors import UserError
from shampax.framework.checkpoint import takeover
from shampax.framework.checkpoint.origin import Origin
from shampax.framework.config.components import build
from shampax.framework.distributed.signals import StopSignals
from shampax.framework.planning import planning
from shampax.framework.step import averaging
from shampax.framework.step.averaging import AveragingOptions
from shampax.framework.train import train
from shampax.launch import checkpoint
from shampax.optimizers import ShampooOptions
from shampax.optimizers.baselines import AdamWOptions
from shampax.optimizers.checkpoint.inheritance import Kept

EMA = AveragingOptions("ema", decay=0.8, beta=0.9, rate_power=2.0)
FREE = AveragingOptions("schedule_free", decay=0.0, beta=0.9, rate_power=2.0)
START = np.array([1.0, -2.0, 0.5])
CURVATURE = np.array([1.0, 0.3, 3.0])


def configure(config):
    return averaging.configured(config, build(config.optimizer))


def descend(options, rates):
    """The averages that gradient descent on a quadratic gives, and the points of its gradients."""
    variables = {"params": jnp.asarray(START, jnp.float32), "count": jnp.int32(0)}
    like = averaging.abstract(variables, options, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    current, averages, points = averaging.initial(variables, like), [], []
    for rate in np.float32(rates):
        at = averaging.point(variables, current, options)
        updates = -rate * jnp.float32(CURVATURE) * at["params"]
        iterate = {"params": averaging.moved(variables, current, updates), "count": at["count"] + 1}
        variables, current = averaging.advance(variables, current, iterate, jnp.float32(rate), options)
        points.append(np.asarray(at["params"]))
        averages.append(np.asarray(variables["params"]))
    assert variables["count"] == len(rates)
    return np.array(averages), np.array(points)


def by_definition(rates, *, beta, power):
    """Algorithm 1 of arXiv 2405.15682 around gradient descent, in float64."""
    x = z = START
    averages, total = [], 0.0
    for t, rate in enumerate(rates):
        y = (1 - beta) * z + beta * x
        z = z - rate * CURVATURE * y
        weight = max(rates[: t + 1]) ** power
        total += weight
        share = weight / total if total else 0.0
        x = (1 - share) * x + share * z
        averages.append(x)
    return np.array(averages)


def test_ema_is_that_of_optax_around_an_undisturbed_descent():
    """Fault: an average that begins at zero uncorrected, weighs the start, or whose gradient is taken elsewhere."""
    averages, points = descend(EMA, [0.1] * 25)
    iterates = START * (1 - 0.1 * CURVATURE) ** np.arange(26)[:, None]
    np.testing.assert_allclose(points, iterates[:-1], rtol=1e-5)
    tx = optax.ema(EMA.decay, debias=True)
    state = tx.init(jnp.zeros(3))
    for average, iterate in zip(averages, iterates[1:], strict=True):
        expected, state = tx.update(jnp.asarray(iterate, jnp.float32), state)
        np.testing.assert_allclose(average, expected, rtol=1e-5)
    weights = EMA.decay ** np.arange(25)[::-1]
    np.testing.assert_allclose(averages[-1], weights @ iterates[1:] / weights.sum(), rtol=1e-5)


@pytest.mark.parametrize(("beta", "power"), [(0.9, 2.0), (0.5, 0.0), (0.0, 1.0), (1.0, 2.0)])
def test_schedule_free_is_the_papers(beta, power):
    """Fault: beta from the wrong end, weights without the warm-up, of the rate itself, or a step late; beta 0 or 1."""
    rates = [0.0, 0.02, 0.04, 0.06, 0.08, *[0.1] * 20, 0.05, 0.05]
    averages, _ = descend(dataclasses.replace(FREE, beta=beta, rate_power=power), rates)
    np.testing.assert_allclose(averages, by_definition(rates, beta=beta, power=power), rtol=2e-5, atol=1e-6)


def test_schedule_free_is_optax_contribs():
    """Fault: another rule than the one that optax has around plain descent."""
    averages, points = descend(FREE, [0.1] * 25)
    tx = optax.contrib.schedule_free(optax.sgd(0.1), 0.1, b1=FREE.beta)
    y = jnp.asarray(START, jnp.float32)
    state = tx.init(y)
    for average, point in zip(averages, points, strict=True):
        np.testing.assert_allclose(point, y, rtol=1e-4, atol=1e-6)
        updates, state = tx.update(jnp.float32(CURVATURE) * y, state, y)
        y = optax.apply_updates(y, updates)
        expected = optax.contrib.schedule_free_eval_params(state, y)
        np.testing.assert_allclose(average, expected, rtol=1e-4, atol=1e-6)


OPTIMIZERS = {
    "ema of adamw": (EMA, AdamWOptions()),
    "schedule_free adamw": (FREE, AdamWOptions(beta1=0.0)),
    "ema of shampoo with statistics on the host": (
        EMA,
        ShampooOptions(block_size=8, interval=3, statistics_memory="host"),
    ),
}


@functools.cache
def bench(name, devices=2):
    options, optimizer = OPTIMIZERS[name]
    task = toy.ToyTask(nan_steps=NAN[:2], spike_steps=(SPIKE,), seed=SEED)
    return Bench({"fsdp": devices}, task=task, options=optimizer, guard_options=SKIP, average=options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bad_steps_leave_the_average_bitwise_alone(name):
    """Fault: a skipped step that moves average, iterate or weights, or that counts in them."""
    count, bad = SPIKE + 2, (*NAN[:2], SPIKE)
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
    """Of the iterate."""
    return state.averaging.iterate["params"]


@pytest.mark.parametrize("name", ["ema of adamw", "schedule_free adamw"])
def test_the_average_is_the_same_on_other_devices_and_lies_as_the_parameters(name):
    """Fault: an iterate that is replicated, or an average of a device's own."""
    states = [steps(bench(name, devices), 4)[0] for devices in (2, 1)]
    for average, iterate in zip(*map(jax.tree.leaves, (states[0].params, parameters(states[0]))), strict=True):
        assert average.sharding.spec == iterate.sharding.spec
    assert any(parameters(states[0])["embed"]["kernel"].sharding.spec)
    for part in ("params", "averaging"):
        pair = [jax.tree.leaves(host(getattr(state, part))) for state in states]
        for ours, theirs in zip(*pair, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_an_ema_does_not_touch_the_training():
    """Fault: a loss or an update that is the average's."""
    plain = Bench({"data": 1})
    averaged = Bench({"data": 1}, average=EMA)
    (end, metrics), (other, measured) = (steps(each, 6) for each in (plain, averaged))
    np.testing.assert_array_equal(metrics["loss"], measured["loss"])
    assert_bitwise_equal(end.params, parameters(other))
    assert_bitwise_equal(end.opt_state, other.opt_state)


def averaged_config(**changes):
    optimizer = base.component(SHAMPOO, block_size=8, interval=3, refresh="host", delay=1)
    return make_config(optimizer=optimizer, **{"averaging.kind": "ema", "averaging.decay": 0.9} | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 12 steps with roots on the host and an average."""
    workdir = tmp_path_factory.mktemp("averaging") / "run"
    return workdir, train(averaged_config(), workdir, devices=two())


def heldout_loss(params):
    source = toy.ToySource(20, 2)
    batch = {name: np.stack([source[i][name] for i in range(20)]) for name in source[0]}
    loss, _ = toy.ToyTask().loss({"params": params, "counters": {"batches": 0}}, batch, key=None, train=False)
    return float(loss)


def test_the_average_is_what_is_evaluated_and_exported(run, tmp_path, capsys):
    """Fault: held-out loss or exported parameters of the iterate."""
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
    assert re.search(r"iterate of the average +5 +5,128", capsys.readouterr().out)


def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(run, tmp_path, monkeypatch):
    """Fault: an iterate or a weight that a checkpoint leaves out."""
    whole, _ = run
    monkeypatch.setattr(StopSignals, "reason", lambda self, step: "SIGINT" if step == 6 else None)
    train(averaged_config(), tmp_path, devices=two())
    monkeypatch.undo()
    train(averaged_config(), tmp_path, devices=two())
    assert lines(tmp_path) == lines(whole)
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path, 12), arrays(whole, 12))


@pytest.mark.slow
def test_a_run_without_an_average_begins_one_and_leaves_it_and_says_so(run, tmp_path):
    """Fault: an average that begins at random parameters, is taken for another kind's, or is lost without a word."""
    whole, _ = run
    plain = tmp_path / "plain"
    train(averaged_config(**{"averaging.kind": "none", "resume_from": str(whole)}), plain, devices=two())
    assert "the parameters are the average of that run; the iterate it was made of is left behind" in told(plain)
    jax.tree.map(np.testing.assert_array_equal, arrays(plain, 12)["params"], arrays(whole, 12)["params"])
    assert "averaging" not in {name for name, tree in arrays(plain, 12).items() if jax.tree.leaves(tree)}

    again = tmp_path / "again"
    mesh = {"mesh.data": 1, "mesh.fsdp": 2}
    train(averaged_config(resume_from=str(plain), **mesh), again, devices=two())
    expected = "hidden/kernel: parameter, momentum, second moment, statistics, roots taken over; average afresh"
    assert f"{expected} (there is none)" in told(again)
    assert "averaging/weights/ema: afresh (there is none)" in told(again)
    begun = arrays(again, 12)
    assert_bitwise_equal(begun["params"], begun["averaging"]["iterate"]["params"])
    assert_bitwise_equal(begun["params"], arrays(plain, 12)["params"])

    free = {"averaging.kind": "schedule_free", "schedule.decay": "constant", "optimizer.beta1": 0.0}
    train(averaged_config(resume_from=str(whole), **free), tmp_path / "free", devices=two())
    text = told(tmp_path / "free")
    assert "averaging/weights/schedule_free: afresh (there is none)" in text
    assert "average afresh" not in text
    iterates = [arrays(path, 12)["averaging"]["iterate"] for path in (tmp_path / "free", whole)]
    assert_bitwise_equal(*iterates)


def test_another_runs_model_is_its_average(run):
    """Fault: a new run that begins with the model of another one and with that one's iterate."""
    workdir, _ = run
    begun = Bench({"data": 1}, average=EMA)
    origin = Origin("init", workdir / "checkpoints" / "12")
    taken = takeover.plan(origin, begun.abstract, begun.tx, SHAMPOO, ())
    for kernel in ("params/hidden/kernel", "params/out/kernel"):
        assert taken.sources[kernel] == taken.sources[f"averaging/iterate/{kernel}"] == Kept(kernel)
    assert not taken.lines
    assert "averaging/weights/ema" in taken.fresh


def told(workdir):
    return (workdir / "restored.txt").read_text()


def test_a_plan_counts_the_iterate():
    """Fault: a plan that says of twice the parameters that they fit."""
    found = planning.figures(specified(averaged_config()), two(), compiles=False).bytes
    without = planning.figures(specified(averaged_config(**{"averaging.kind": "none"})), two(), compiles=False).bytes
    assert "iterate of the average" not in without
    # Parameters, one count, one weight.
    assert found["iterate of the average"] == found["parameters"] + 4 + 4


def specified(config):
    config.unlock()
    config.data = base.component("toy_specified:SpecifiedData")
    return config.lock()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "swa"}, "averaging.kind is 'swa'; choose one of none, ema, schedule_free"),
        ({"kind": "ema", "decay": 1.0}, "averaging.decay is 1.0; it must be at least 0 and below 1, such as 0.999"),
        ({"decay": float("nan")}, "averaging.decay is nan"),
        ({"beta": 1.5}, "averaging.beta is 1.5; it must lie between 0 and 1, such as 0.9"),
        ({"rate_power": -1.0}, "averaging.rate_power is -1.0; it must be at least 0 and finite"),
        (
            {"kind": "schedule_free"},
            "averaging.kind 'schedule_free' takes the place of the schedule's decay, but schedule.decay is 'cosine'; "
            "set it to constant",
        ),
    ],
)
def test_what_cannot_be_averaged_is_refused(changes, message):
    """Fault: a knob out of range, or a method beside the one that it takes the place of."""
    with pytest.raises(UserError, match=re.escape(f"config.{message}")):
        configure(make_config(**{f"averaging.{key}": value for key, value in changes.items()}))


@pytest.mark.parametrize(
    ("optimizer", "field"),
    [
        (SHAMPOO, "beta1"),
        *[
            (f"shampax.optimizers.baselines:{name}Options", field)
            for name, field in [
                ("AdamW", "beta1"),
                ("Lamb", "beta1"),
                ("Momentum", "momentum"),
                ("Adafactor", "momentum"),
                ("Muon", "beta"),
            ]
        ],
    ],
)
def test_schedule_free_has_no_momentum_beside_it(optimizer, field):
    """Fault: momentum twice, without a word."""
    config = make_config(
        optimizer=base.component(optimizer), **{"averaging.kind": "schedule_free", "schedule.decay": "constant"}
    )
    value = config.optimizer[field]
    with pytest.raises(UserError, match=rf"takes the place of momentum, but optimizer.{field} is {value}; set it to 0"):
        configure(config)
    for each in ("beta1", "beta", "momentum"):
        if isinstance(config.optimizer.get(each), float):
            config.optimizer[each] = 0.0
    configure(config)


def test_without_an_average_nothing_is_kept():
    """Fault: a default that costs memory or changes what checkpoints hold."""
    assert base.get_config().averaging.kind == averaging.OFF.kind == "none"
    assert not jax.tree.leaves(Bench({"data": 1}).abstract.averaging)
