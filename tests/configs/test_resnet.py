import functools

import imagenet
import jax
import numpy as np
import pytest
from shrunk import RESNET as SMALL
from step_bench import initial_state
from traced import quick_jit
from workdirs import cut_short, history

from shampax.framework import optimizer
from shampax.framework.config import components
from shampax.framework.config.check import load
from shampax.framework.sharding import meshes, placement
from shampax.framework.step.schedule import make_schedule
from shampax.framework.step.state import abstract_state, abstract_variables
from shampax.framework.step.steps import make_train_step
from shampax.framework.train import train

SHAMPOO = ("optimizer.block_size=8", "optimizer.interval=2")


def configured(variant, *changes):
    return load(f"shampax/configs/resnet.py:{variant}", [*SMALL, *changes])


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    imagenet.prepare(directory, {"train": imagenet.photos(40), "validation": imagenet.photos(21, 40)})
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sample_sgd", "resnet50", "paper"])
def test_every_variant_trains(variant, tfds_dir, tmp_path):
    """Faults: a shipped config does not build, compile or train; held-out images that do not fill a batch fail."""
    changes = ["duration=3 steps", "evaluation.every=0 steps"]
    if variant != "sample_sgd":
        changes += [f"data.data_dir={tfds_dir}", "data.image_size=32", "mesh.data=2", "task.batch_norm_group=8"]
    if variant == "paper":
        changes += ["task.stages=(1,)", "task.width=4"]
        changes += ["optimizer.block_size=16", "optimizer.merge_dims=16", "optimizer.start_step=1"]
    result = train(configured(variant, *changes), tmp_path, devices=jax.devices()[:2])
    assert (result["steps"], result["skipped_steps"]) == (3, 0)
    assert np.isfinite(result["heldout_loss"])
    assert 0 <= result["accuracy"] <= result["top5"] <= 1
    assert (result["refreshes"] > 0) == (variant == "paper")


def six_steps_of_the_sample():
    changes = ("duration=6 steps", "evaluation.every=0 steps", "checkpoint.every=3 steps", "schedule.decay=constant")
    return configured("sample", *SHAMPOO, *changes)


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    """Train the shrunk sample without interruption."""
    workdir = tmp_path_factory.mktemp("resnet") / "whole"
    return workdir, train(six_steps_of_the_sample(), workdir, devices=jax.devices()[:2])


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(six_steps, tmp_path):
    """Faults: a resumed run restarts batch statistics, or uses the augmentation of other steps."""
    whole, result = six_steps
    assert (result["steps"], result["skipped_steps"]) == (6, 0) and result["refreshes"] > 0
    cut = cut_short(whole, tmp_path / "cut", 3)
    again = train(six_steps_of_the_sample(), cut, devices=jax.devices()[:2])
    assert (again["heldout_loss"], again["accuracy"]) == (result["heldout_loss"], result["accuracy"])
    assert history(cut, "train/loss") == history(whole, "train/loss")


def test_golden_steps(six_steps):
    """Fault: an unintended change of initialisation, data, model, loss or optimizer."""
    golden = {
        "train/loss": [2.30123, 2.30532, 2.28781],
        "train/gradient_norm": [0.31984, 0.44042, 0.39470],
        "train/update_norm": [0.07244, 0.27551, 0.23495],
    }
    for key, values in golden.items():
        np.testing.assert_allclose(history(six_steps[0], key)[:5:2], values, rtol=2e-3, err_msg=key)


@pytest.fixture(scope="module")
def stepping():
    """Return the shrunk sample's task, train step (2 micro-batches, 2 devices), initial state function and a batch."""
    config = configured("sample_sgd", "task.stages=(1,)")
    task, data, options = (components.build(section) for section in (config.task, config.data, config.optimizer))
    mesh = meshes.make_mesh(config.mesh, jax.devices()[:2])
    source = data.examples("train", None)
    examples = [source[index] for index in range(0, 1_600, 100)]
    with jax.set_mesh(mesh):
        sharding = meshes.batch_sharding(mesh)
        batch = {name: jax.device_put(np.stack([x[name] for x in examples]), sharding) for name in examples[0]}
        spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)
        variables = abstract_variables(task, spec)
        axes = task.logical_axes(variables)
        placements = placement.place_all(variables, axes, config.sharding_rules, mesh)
        schedule = make_schedule(0.1, warmup_steps=0, total_steps=10, decay="constant", final_fraction=0.0)
        tx = options.build(schedule, mesh=mesh, axis_names=axes["params"])
        abstract = abstract_state(variables, tx, placements, mesh)
        step = make_train_step(
            task,
            tx,
            schedule,
            abstract,
            mesh,
            seed=0,
            microbatches=2,
        )
        return task, step, lambda: initial_state(task, tx, spec, abstract, 0), batch


def test_microbatches_update_batch_statistics_in_sequence(stepping):
    """Fault: only the first or last micro-batch updates batch statistics."""
    task, step, begin, batch = stepping
    loss = quick_jit(functools.partial(task.loss, key=jax.random.key(0), train=True))
    state = begin()
    expected = jax.device_get(state.variables)
    for part in range(2):
        rows = {name: np.asarray(array)[part::2] for name, array in batch.items()}
        _, (model_state, _) = loss(expected, rows)
        expected = expected | jax.device_get(model_state)
    state, _ = step(state, batch)
    found = jax.device_get(state.model_state)["batch_stats"]
    jax.tree.map(
        lambda left, right: np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-4),
        found,
        expected["batch_stats"],
    )


def test_a_skipped_step_keeps_batch_statistics(stepping):
    """Fault: a skipped batch updates batch statistics."""
    _, step, begin, batch = stepping
    state, metrics = step(begin(), batch)
    assert metrics["skipped"] == 0
    before = jax.device_get((state.params, state.model_state))
    broken = batch | {"weight": batch["weight"].at[3].set(np.inf)}
    state, metrics = step(state, broken)
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.params, state.model_state)), before)
    state, _ = step(state, batch)
    assert (
        np.asarray(state.model_state["batch_stats"]["stem_norm"]["mean"])
        != before[1]["batch_stats"]["stem_norm"]["mean"]
    ).any()


def test_shampoo_folds_kernels_as_the_paper_does():
    """Faults: scanned blocks are mixed in a matrix; kernel positions are on the output side."""
    config = configured("sample", "task.stages=(1, 3)")
    task, data = (components.build(section) for section in (config.task, config.data))
    spec = {name: jax.ShapeDtypeStruct((16, *x.shape), x.dtype) for name, x in data.spec().items()}
    variables = abstract_variables(task, spec)
    axes = task.logical_axes(variables)["params"]
    schedule = make_schedule(0.1, warmup_steps=0, total_steps=10, decay="constant", final_fraction=0.0)
    seen = {}
    for variant in ("sample", "paper"):
        options = components.build(configured(variant, "optimizer.block_size=1024").optimizer)
        made = optimizer.treatments(options.build(schedule, mesh=None, axis_names=axes), variables["params"])
        seen[variant] = [made[f"{name}/kernel"] for name in ("stem", "stage2_first/conv1", "stage2_rest/conv2")]
    assert seen["sample"] == ["shampoo 8x9 p2 x1", "shampoo 16x72 p2 x1", "shampoo 16x144 p2 x2"]
    assert seen["paper"] == ["shampoo 8x9 p4 x1", "shampoo 16x72 p4 x1", "shampoo 9x16x16 p4 x2"]
