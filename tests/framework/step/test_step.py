import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from jax.sharding import PartitionSpec as P
from programs import communicates, inside_loops
from step_bench import (
    CLIP,
    NAN,
    SEED,
    Bench,
    assert_bitwise_equal,
    assert_same_on_all_devices,
    host,
    steps,
)

from shampax.framework.planning import collectives
from shampax.framework.sharding import meshes
from shampax.framework.step.steps import global_norm, make_eval_step, make_predict_step
from shampax.optimizers import ShampooOptions
from shampax.optimizers.baselines import AdamWOptions, MuonOptions


@dataclasses.dataclass(frozen=True)
class Keep:
    """An optimizer whose state and update are the gradient."""

    def build(self, learning_rate, *, mesh, axis_names):
        def update(gradients, state, params):
            return gradients, gradients

        return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


@functools.cache
def shared_bench(**sizes):
    return Bench(sizes)


MESHES = [{"data": 2}, {"fsdp": 4}, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.fixture(scope="module")
def on_one_device():
    bench = Bench({"data": 1})
    return host(bench.initial()), bench.losses(20)


@pytest.mark.parametrize("sizes", [pytest.param(MESHES[0], marks=pytest.mark.slow), *MESHES[1:]], ids=str)
def test_same_start_and_same_losses_on_every_mesh(sizes, on_one_device):
    initial, losses = on_one_device
    bench = shared_bench(**sizes)
    assert_bitwise_equal(bench.initial(), initial)
    assert losses[-1] < losses[0] - 0.3
    np.testing.assert_allclose(bench.losses(20), losses, rtol=1e-4)


def test_state_is_sharded_by_the_rules_and_stays_so():
    bench = Bench({"fsdp": 4, "tensor": 2})
    current = bench.initial()
    for _ in range(2):
        assert current.params["embed"]["kernel"].sharding.spec == P("tensor", "fsdp")
        first, second = (optax.tree_utils.tree_get(current.opt_state, name) for name in ("mu", "nu"))
        assert first["embed"]["kernel"].sharding.spec == P("tensor", "fsdp")
        assert second["out"]["kernel"].sharding.spec == P("tensor")  # vocab comes second there
        current, _ = bench.step(current, bench.batch(0))


@pytest.mark.parametrize("options", [AdamWOptions(), MuonOptions()], ids=lambda o: type(o).__name__)
def test_plain_optax_states_get_shardings(options):
    bench = Bench({"fsdp": 4, "tensor": 2}, options=options)
    sharded = [leaf for leaf in jax.tree.leaves(bench.abstract.opt_state) if any(leaf.sharding.spec)]
    assert len(sharded) >= 3  # at least one array mirrors each parameter
    for leaf in sharded:
        assert leaf.shape in {(16, 16), (16, 32), (32, 16)}


def test_accumulated_gradient_equals_that_of_the_whole_batch_with_uneven_masks():
    microbatches = 4
    gradients, losses = [], []
    for count in (1, microbatches):
        bench = Bench({"data": 2, "fsdp": 2}, options=Keep(), batch_size=32, microbatches=count)
        batch = host(bench.batch(0))
        batch["weights"][::microbatches] = 0  # the first micro-batch has no targets
        weights = batch["weights"].reshape(-1, microbatches, 8).sum((0, 2))
        assert weights[0] == 0
        assert len(set(weights)) > microbatches / 2
        new, metrics = bench.step(bench.initial(), batch)
        assert int(metrics["skipped"]) == 0
        gradients.append(host(new.opt_state))
        losses.append(float(metrics["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for whole, accumulated in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(accumulated, whole, rtol=0, atol=1e-6 * np.abs(whole).max())


@dataclasses.dataclass(frozen=True)
class Stateless(toy.ToyTask):
    """The toy without model state."""

    def init(self, key, batch_spec):
        return {"params": super().init(key, batch_spec)["params"]}

    def loss(self, variables, batch, *, key, train):
        counters = {"batches": jnp.zeros((), jnp.int32)}
        loss, (_, metrics) = super().loss(variables | {"counters": counters}, batch, key=key, train=train)
        return loss, ({}, metrics)

    def logical_axes(self, variables):
        return {"params": super().logical_axes(variables)["params"]}


def test_gradients_of_micro_batches_cross_the_network_once():
    """Fault: gradients are summed over all devices in every turn of the loop over micro-batches."""
    bench = Bench({"data": 8}, task=Stateless(), batch_size=32, microbatches=4)
    text = bench.step.lower(bench.abstract, bench.batch(0)).compile().as_text()
    assert not communicates(inside_loops(text))
    (found,) = (each for each in collectives.find(text) if each.bytes > 100)  # no scalars
    parameters = meshes.bytes_on_device(bench.abstract.params)
    assert found.kind == "all-reduce" and 0 <= found.bytes - parameters < 64  # scalars travel with them


def test_micro_batches_of_replicas_give_the_gradient_of_the_whole_batch():
    """Faults: a replica's mean counts like the batch's; replicas share random numbers; sums lack a replica."""
    steps = {}
    for sizes, count in (({"data": 1}, 1), ({"data": 4}, 4), ({"data": 2, "fsdp": 2}, 2)):
        bench = Bench(sizes, task=Stateless(), options=Keep(), batch_size=32, microbatches=count)
        batch = host(bench.batch(0))
        batch["weights"][::4] = 0
        batch["weights"][:8] = 0
        new, metrics = bench.step(bench.initial(), batch)
        steps[count] = host((new.opt_state, metrics["loss"], metrics["accuracy"]))
    for count in (2, 4):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), steps[count], steps[1])


def test_microbatches_stay_on_their_devices():
    bench = Bench({"data": 8}, microbatches=2)
    text = bench.step.lower(bench.abstract, bench.batch(0)).compile().as_text()
    assert "all-reduce" in text
    assert not any(word in text for word in ("all-to-all", "collective-permute", "all-gather"))


@pytest.mark.parametrize(("sizes", "microbatches"), [({"data": 8}, 1), ({"fsdp": 8}, 2)], ids=str)
def test_one_bad_element_on_one_device_changes_only_counters(sizes, microbatches):
    bench = Bench(sizes, microbatches=2) if microbatches > 1 else shared_bench(**sizes)
    current, _ = bench.step(bench.initial(), bench.batch(0))
    before = host(current)
    bad = host(bench.batch(1))
    bad["weights"][11, 3] = np.nan  # example 11 is on device 5 or, with micro-batches, a nearby one
    current, metrics = bench.step(current, bad)
    after = host(current)
    for part in ("params", "opt_state", "model_state"):
        assert_bitwise_equal(getattr(before, part), getattr(after, part))
    assert (after.step, after.guard.skipped, after.guard.consecutive) == (2, 1, 1)
    assert (metrics["skipped"], metrics["consecutive_skips"], metrics["update_norm"]) == (1, 1, 0)
    assert not np.isfinite(metrics["loss"])
    assert_same_on_all_devices(current)

    current, metrics = bench.step(current, bench.batch(2))
    assert (int(current.step), int(current.guard.skipped), int(current.guard.consecutive)) == (3, 1, 0)
    assert np.isfinite(metrics["loss"])
    assert any(
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (host(current.params), before.params)), strict=True)
    )


def test_all_devices_skip_if_the_gradient_of_one_shard_is_infinite():
    @dataclasses.dataclass(frozen=True)
    class Steep(toy.ToyTask):
        """A task with a finite loss and an infinite gradient in one element of one sharded parameter."""

        def loss(self, variables, batch, *, key, train):
            loss, (rest, metrics) = super().loss(variables, batch, key=key, train=train)
            element = variables["params"]["embed"]["kernel"][3, 7]
            loss += jnp.sqrt(jnp.abs(element - jax.lax.stop_gradient(element)))
            return loss, (rest, metrics)

    bench = Bench({"fsdp": 8}, task=Steep())
    before = host(bench.initial())
    current, metrics = bench.step(bench.initial(), bench.batch(0))
    assert np.isfinite(metrics["loss"])
    assert_bitwise_equal(current.params, before.params)
    assert_bitwise_equal(current.opt_state, before.opt_state)
    assert int(current.guard.skipped) == 1


OPTIMIZERS = {
    "adamw": AdamWOptions(),
    "staggered": ShampooOptions(block_size=8, interval=3, early_intervals=()),
}


@dataclasses.dataclass(frozen=True)
class Scaled(toy.ToyTask):
    """A task whose loss is multiplied by a number."""

    factor: float = 1.0

    def loss(self, variables, batch, *, key, train):
        loss, (rest, metrics) = super().loss(variables, batch, key=key, train=train)
        return loss * self.factor, (rest, metrics | {"loss": (metrics["loss"][0] * self.factor, metrics["loss"][1])})


@pytest.mark.parametrize("name", ["adamw", "staggered"])
def test_finite_gradients_whose_squares_overflow_are_refused_and_counted(name):
    """Faults: second moments become infinite for good; an optimizer refuses every step and nobody counts it; the
    reported learning rate is that of another step than the optimizer's."""
    bench = Bench({"data": 2}, task=Scaled(factor=1e22), options=OPTIMIZERS[name])
    before, state = host(bench.initial()), bench.initial()
    for step in range(2):
        state, metrics = bench.step(state, bench.batch(step))
        assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])
    assert (metrics["skipped"], metrics["consecutive_skips"], metrics["update_norm"]) == (2, 2, 0)
    assert float(metrics["learning_rate"]) == pytest.approx(0.01)
    for part in ("params", "opt_state", "model_state"):
        assert_bitwise_equal(getattr(state, part), getattr(before, part))


def test_skipped_steps_do_not_advance_the_learning_rate():
    bench = shared_bench(data=8)
    current, rates = bench.initial(), []
    for step in range(4):
        batch = host(bench.batch(step))
        if step == 1:
            batch["weights"][0, 0] = np.inf
        current, metrics = bench.step(current, batch)
        rates.append(float(metrics["learning_rate"]))
    drop = (0.01 - 0.001) / 20
    np.testing.assert_allclose(rates, [0.01, 0.01 - drop, 0.01 - drop, 0.01 - 2 * drop], rtol=1e-5)


def test_clipping_bounds_the_gradient_of_the_optimizer():
    for bound in (0.01, 1e6):
        bench = Bench({"data": 1}, options=Keep(), gradient_clip=bound)
        _, metrics = bench.step(bench.initial(), bench.batch(0))
        norm = float(metrics["gradient_norm"])
        assert norm > 0.1
        assert float(metrics["update_norm"]) == pytest.approx(min(norm, bound))


@functools.cache
def faulty_bench(optimizer):
    task = toy.ToyTask(nan_steps=NAN, seed=SEED)
    return Bench({"data": 8}, task=task, options=OPTIMIZERS[optimizer], gradient_clip=CLIP)


@pytest.mark.parametrize("optimizer", ["adamw", "staggered"])
def test_a_run_with_bad_steps_is_bitwise_the_run_without_them(optimizer):
    """Faults: a bad step changes a parameter, a moment, a statistic, a root or the schedule of refreshes, or
    counts as clipped; other devices do not learn of a NaN on one of eight; counts do not add up."""
    bench, bad = faulty_bench(optimizer), NAN
    whole, metrics = steps(bench, 55)
    assert_same_on_all_devices(whole)
    numbers = np.arange(1, 56)
    skipped = np.isin(numbers, bad)
    assert np.array_equal(metrics["skipped"], np.cumsum(skipped))
    assert np.array_equal(numbers[metrics["consecutive_skips"] > 0], sorted(bad))
    assert metrics["consecutive_skips"][5] == 2
    assert not metrics["update_norm"][skipped].any()
    too_long = metrics["gradient_norm"] > CLIP
    assert 5 < too_long.sum() < 50
    assert np.array_equal(metrics["clipped"], np.cumsum(too_long & ~skipped))

    without, _ = steps(bench, 55, without=bad)
    for part in ("params", "opt_state", "model_state"):
        assert_bitwise_equal(getattr(whole, part), getattr(without, part))
    assert_bitwise_equal(dataclasses.replace(whole.guard, skipped=0), dataclasses.replace(without.guard, skipped=0))


@pytest.mark.parametrize("scale", [2.0**-70, 1.0, 2.0**100])
def test_global_norm_does_not_overflow_in_the_squares(scale):
    tree = {"a": jnp.array([3.0, 0.0]) * scale, "b": jnp.array([[4.0]]) * scale}
    assert float(global_norm(tree)) == 5 * scale


def test_global_norm_of_zeros_is_zero():
    assert float(global_norm({"a": jnp.zeros(3)})) == 0.0


def test_evaluation_sums_match_the_loss():
    bench = shared_bench(data=2, fsdp=2, tensor=2)
    initial = bench.initial()
    metrics = bench.eval_step(initial.variables, bench.batch(0))
    loss, (_, expected) = bench.task.loss(
        host(initial.variables), host(bench.batch(0)), key=jax.random.key(0), train=False
    )
    total, weight = metrics["loss"]
    assert float(weight) == float(expected["loss"][1])
    assert float(total / weight) == pytest.approx(float(loss), rel=1e-6)


def test_evaluation_in_microbatches_gives_the_metrics_and_predictions_of_the_batch():
    """Fault: metrics are those of one micro-batch, or predictions come in the order of micro-batches."""
    bench = shared_bench(data=2)
    variables, batch = bench.initial().variables, bench.batch(0)
    judge = types.SimpleNamespace(predict=lambda variables, batch: {"tokens": batch["tokens"]})
    parts = make_eval_step(bench.task, bench.abstract.variables, bench.mesh, 4)(variables, batch)
    for name, pair in bench.eval_step(variables, batch).items():
        np.testing.assert_allclose(parts[name], pair, rtol=1e-5)
    predicted = make_predict_step(judge, bench.abstract.variables, bench.mesh, 4)(variables, batch)
    np.testing.assert_array_equal(predicted["tokens"], batch["tokens"])


@dataclasses.dataclass(frozen=True)
class Settling(toy.ToyTask):
    """Multiplies the number of batches by ten after each step."""

    def settle(self, model_state):
        return {"counters": {"batches": 10 * model_state["counters"]["batches"]}}


def test_model_state_settles_once_per_accepted_step():
    """Faults: it settles after every micro-batch, or after a refused step."""
    bench = Bench({"data": 2}, task=Settling(), microbatches=2)
    current, _ = bench.step(bench.initial(), bench.batch(0))
    bad = host(bench.batch(1))
    bad["weights"][11, 3] = np.nan
    current, _ = bench.step(current, bad)
    assert int(current.model_state["counters"]["batches"]) == 10 * 2
    current, _ = bench.step(current, bench.batch(2))
    assert int(current.model_state["counters"]["batches"]) == 10 * (10 * 2 + 2)
