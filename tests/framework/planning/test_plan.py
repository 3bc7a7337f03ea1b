"""Compare plans with the arrays of training and the compiler's figures."""

import jax
import numpy as np
import pytest

from shampax.configs import base
from shampax.framework.base.errors import UserError
from shampax.framework.config.check import load
from shampax.framework.planning import tables
from shampax.framework.planning.plan import PROGRAMS, Compiled, Plan, make_plan
from shampax.optimizers.linalg.symmetric import packed_shape

SHAMPOO = "shampax.optimizers.shampoo:ShampooOptions"
ADAMW = "shampax.optimizers.baselines:AdamWOptions"


def make_config(optimizer=SHAMPOO, **changes):
    config = base.get_config()
    config.task = base.component("toy:ToyTask", width=32, hidden=64)
    config.data = base.component("toy_specified:SpecifiedData")
    config.optimizer = base.component(optimizer)
    config.batch_size = 16
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def found():
    """Plan Shampoo for 4 CPU devices, two of which share the parameters, and compile it for them."""
    config = make_config(**{"mesh.fsdp": 2, "optimizer.block_size": 32})
    return make_plan(config, jax.devices()[:4], compiles=PROGRAMS)


def test_bytes_match_the_compiler(found):
    """Faults: a part of the state is missing, counted whole although it is sharded, or counted twice."""
    train, evaluation = found.compiled["train"], found.compiled["evaluate"]
    assert train.arguments == pytest.approx(found.state_bytes, rel=0.02)
    assert evaluation.arguments == pytest.approx(found.bytes["parameters"] + found.bytes["batch"], rel=0.02)
    assert found.peak >= max(train.peak, found.state_bytes)
    assert found.bytes["parameters"] == 4 * (16 * 32 // 2 + 32 * 64 // 2 + 64 * 16)  # "out" has no "embed" axis
    # 4 blocks of 32 x 32 and 2 of 16 x 32 or so: one momentum and one second moment as large as the blocks held
    held = sum(row["slots on a device"] * np.prod(row["shape"]) * 4 for row in found.blocks)
    diagonal = 4 * 16 * 32 // 2
    assert held <= found.bytes["momentum"] <= held + diagonal
    assert found.bytes["momentum"] == found.bytes["second moments"]

    def of_sides(count):
        return sum(row["slots on a device"] * 4 * sum(map(count, row["shape"])) for row in found.blocks)

    assert found.bytes["statistics"] == pytest.approx(of_sides(lambda r: np.prod(packed_shape(r))), rel=0.01)
    assert found.bytes["roots"] == pytest.approx(of_sides(lambda r: r * r), rel=0.05)


def test_frozen_parameters_cost_only_themselves():
    """Faults: the plan of adapters has gradients, momentum or statistics for their base."""
    config = make_config(**{"optimizer.block_size": 8})
    config.task = base.component("mlp_tasks:LinenNetTask", rank=2)
    config.data = base.component("mlp_tasks:PointsData")
    bytes_of = make_plan(config, jax.devices()[:1]).bytes
    adapters, base_of = 4 * 2 * (6 + 8 + 8 + 8), 4 * (6 * 8 + 8 + 8 * 8 + 8 + 2 * 8 + 8 * 4 + 4)
    assert (bytes_of["parameters"], bytes_of["gradients"], bytes_of["frozen parameters"]) == (
        adapters,
        adapters,
        base_of,
    )
    assert bytes_of["momentum"] <= 2 * adapters


def test_sparse_tables_have_no_gradient():
    """Fault: the plan has a gradient of all rows of tables of which a step updates some."""
    config = load("shampax/configs/dlrm.py:criteo_kaggle", ())
    bytes_of = make_plan(config, jax.devices()[:4]).bytes
    assert bytes_of["gradients"] < 0.01 * bytes_of["parameters"]


def test_treatments_and_buckets(found):
    """Faults: parameters are listed with another treatment; padding leaves out empty slots."""
    assert found.parameters == {"diagonal": (1, 16 * 32), "shampoo": (2, 32 * 64 + 64 * 16)}
    real = 32 * 64 + 64 * 16
    held = sum(4 * row["slots on a device"] * np.prod(row["shape"]) for row in found.blocks)
    padded = sum(4 * row["slots on a device"] * np.prod(row["shape"]) * row["padding"] for row in found.blocks)
    assert held - padded == pytest.approx(real)


def test_collectives_are_counted(found):
    """Faults: the table of traffic is empty; it lacks the transfer of blocks to their owners."""
    traffic = found.compiled["train"].work.traffic["all-to-all"]
    assert traffic.count >= 2
    assert 0 < traffic.sent < traffic.bytes
    assert found.compiled["evaluate"].peak > 0


def test_other_optimizers_have_named_bytes():
    """Fault: only Shampoo's state has names."""
    plan = make_plan(make_config(ADAMW), jax.devices()[:2])
    parameters = 4 * (16 * 32 + 32 * 64 + 64 * 16)
    assert (plan.bytes["momentum"], plan.bytes["second moments"]) == (parameters, parameters)
    assert plan.blocks == []
    assert plan.compiled == {}
    assert (plan.peak, plan.fits) == (None, None)


def made_up(memory, *, train=0, evaluation=0, error=""):
    """Return a plan with 60 bytes of state, 20 of which are arguments of evaluation."""
    compiled = {"train": Compiled(error, 60, peak=train), "evaluate": Compiled("", 20, peak=evaluation)}
    held = {"parameters": 20, "gradients": 20, "momentum": 40}
    return Plan({"data": 1}, "chip", {}, [], held, 1.0, memory, compiled if train or error else {})


@pytest.mark.parametrize(
    ("plan", "peak", "fits"),
    [
        (made_up(100), None, None),
        (made_up(50), None, False),
        (made_up(None, train=90, evaluation=30), 90, True),
        (made_up(100, train=90, evaluation=30), 90, True),
        (made_up(80, train=90, evaluation=30), 90, False),
        (made_up(100, train=90, evaluation=70), 110, False),  # and 40 of the optimizer
        (made_up(100, error="too much"), None, False),
    ],
)
def test_a_device_must_hold_both_programs_and_the_state(plan, peak, fits):
    """Faults: the optimizer's state is left out during evaluation; a compiler error counts as success."""
    assert (plan.peak, plan.fits) == (peak, fits)


def test_the_tables_show_every_figure(found):
    """Fault: a figure is computed but not shown."""
    text = tables.text("a config", found)
    for word in (
        "a config on 4 x cpu (data 2, fsdp 2)",
        "3,584",
        "statistics",
        "all-to-all",
        "temporaries",
        "evaluate step",
        "fits: peak",
    ):
        assert word in text
    for row in found.blocks:
        assert row["name"] in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 6}, "batch_size=6: must be divisible by 4 data shards"),
        (
            {"task.width": 2**20, "task.hidden": 2**24},
            "config.task: has 1.76e.13 parameters. Use sizes that make at most",
        ),
        ({"mesh.fsdp": 3}, "4 devices are not divisible by 3"),
        ({"optimizer.treatments": (("hidden.*", "shampoo"),)}, "embed"),
    ],
)
def test_invalid_configs_are_not_planned(changes, words):
    """Fault: a plan for a config that cannot train."""
    with pytest.raises(UserError, match=words):
        make_plan(make_config(**changes), jax.devices()[:4])


def test_data_without_shapes_are_refused():
    """Fault: an AttributeError instead of the fix."""
    config = make_config()
    config.data = base.component("toy:ToyData")
    with pytest.raises(UserError, match=r"toy:ToyData: .* method spec\(\)"):
        make_plan(config, jax.devices()[:4])
