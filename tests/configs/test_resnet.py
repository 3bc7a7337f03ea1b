import json

import imagenet
import jax
import numpy as np
import pytest

from shampax.framework import components, optimizer, partitioning
from shampax.framework.config import load
from shampax.framework.guard import GuardOptions
from shampax.framework.schedule import make_schedule
from shampax.framework.state import abstract_state, abstract_variables, initial_state
from shampax.framework.step import make_train_step
from shampax.framework.train import train

SMALL = (
    "task.stages=(1, 2)",
    "task.width=8",
    "batch_size=16",
    "schedule.warmup=1 steps",
    "evaluation.batches=2",
    "checkpoint.every=0 steps",
    "checkpoint.keep_best=0",
    "log.every=1 steps",
)
SHAMPOO = ("optimizer.block_size=32", "optimizer.interval=2")


def configured(variant, *changes):
    return load(f"shampax/configs/resnet.py:{variant}", [*SMALL, *changes])


def history(workdir, key):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    imagenet.prepare(directory, {"train": imagenet.photos(40), "validation": imagenet.photos(21, 40)})
    return directory


@pytest.mark.parametrize("variant", ["sample_sgd", "resnet50", "paper"])
def test_every_variant_trains(variant, tfds_dir, tmp_path):
    """Fault: a shipped config that does not build, compile, train, or judge held-out images that fill no batch."""
    changes = ["duration=3 steps", "evaluation.every=0 steps"]
    if variant != "sample_sgd":
        changes += [f"data.data_dir={tfds_dir}", "data.image_size=32", "mesh.data=2", "task.batch_norm_group=8"]
        changes += ["task.stages=(1,)" if variant == "paper" else "task.stages=(2,)"]
    if variant == "paper":
        changes += ["optimizer.block_size=32", "optimizer.merge_dims=32", "optimizer.start_step=1"]
    result = train(configured(variant, *changes), tmp_path, devices=jax.devices()[:2])
    assert (result["steps"], result["skipped_steps"]) == (3, 0)
    assert np.isfinite(result["heldout_loss"])
    assert 0 <= result["accuracy"] <= result["top5"] <= 1
    assert (result["refreshes"] > 0) == (variant == "paper")


@pytest.fixture(scope="module")
def eight_steps(tmp_path_factory):
    """The sample, shrunk, without interruption."""
    workdir = tmp_path_factory.mktemp("resnet") / "whole"
    config = configured("sample", *SHAMPOO, "duration=8 steps", "evaluation.every=0 steps", "schedule.decay=constant")
    return workdir, train(config, workdir, devices=jax.devices()[:2])


def test_a_run_goes_on_bitwise(eight_steps, tmp_path):
    """Fault: batch statistics that start anew, or augmentation of other steps, in a run that goes on."""
    whole, result = eight_steps
    changes = (*SHAMPOO, "evaluation.every=0 steps", "schedule.decay=constant")
    train(configured("sample", *changes, "duration=5 steps"), tmp_path / "first", devices=jax.devices()[:2])
    config = configured("sample", *changes, "duration=8 steps", f"resume_from={tmp_path / 'first'}")
    again = train(config, tmp_path / "second", devices=jax.devices()[:2])
    assert (again["heldout_loss"], again["accuracy"]) == (result["heldout_loss"], result["accuracy"])
    assert history(tmp_path / "second", "train/loss") == history(whole, "train/loss")[5:]


def test_golden_steps(eight_steps):
    """Fault: any unmeant change to initialisation, data, model, loss or optimizer."""
    golden = {
        "train/loss": [2.29917, 2.31257, 2.28443],
        "train/gradient_norm": [0.37337, 0.53982, 0.45751],
        "train/update_norm": [0.11157, 0.58039, 0.48627],
    }
    for key, values in golden.items():
        np.testing.assert_allclose(history(eight_steps[0], key)[:5:2], values, rtol=2e-3, err_msg=key)


def stepping(microbatches):
    """The compiled train step of the shrunk sample under momentum on 2 devices, its first state and a batch."""
    config = configured("sample_sgd")
    task, data, options = (components.build(section) for section in (config.task, config.data, config.optimizer))
    mesh = partitioning.make_mesh(config.mesh, jax.devices()[:2])
    source = data.examples("train", None)
    examples = [source[index] for index in range(0, 1_600, 100)]
    with jax.set_mesh(mesh):
        sharding = partitioning.batch_sharding(mesh)
        batch = {name: jax.device_put(np.stack([x[name] for x in examples]), sharding) for name in examples[0]}
        spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)
        variables = abstract_variables(task, spec)
        axes = task.logical_axes(variables)
        placements = partitioning.place_all(variables, axes, config.sharding_rules, mesh)
        schedule = make_schedule(0.1, warmup_steps=0, total_steps=10, decay="constant", final_fraction=0.0)
        tx = options.build(schedule, mesh=mesh, axis_names=axes["params"])
        abstract = abstract_state(task, tx, spec, placements, mesh)
        step = make_train_step(
            task,
            tx,
            schedule,
            abstract,
            mesh,
            seed=0,
            microbatches=microbatches,
            guard_options=GuardOptions("ignore", 8.0, 100),
        )
        return task, step, initial_state(task, tx, spec, abstract, 0), batch


def test_microbatches_update_the_batch_statistics_one_after_the_other():
    """Fault: statistics of the last micro-batch alone, or of the first."""
    task, step, state, batch = stepping(2)
    expected = jax.device_get(state.variables)
    for part in range(2):
        rows = {name: np.asarray(array)[part::2] for name, array in batch.items()}
        _, (model_state, _) = task.loss(expected, rows, key=jax.random.key(0), train=True)
        expected = expected | jax.device_get(model_state)
    state, _ = step(state, batch)
    found = jax.device_get(state.model_state)["batch_stats"]
    jax.tree.map(
        lambda left, right: np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-4),
        found,
        expected["batch_stats"],
    )


def test_a_skipped_step_leaves_the_batch_statistics_as_they_were():
    """Fault: statistics of a batch that the guard has thrown away."""
    _, step, state, batch = stepping(1)
    state, metrics = step(state, batch)
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


def test_shampoo_sees_kernels_as_the_paper_folds_them():
    """Fault: scanned blocks mixed into a matrix, or places of a kernel on the side of its results."""
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
