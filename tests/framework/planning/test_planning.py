"""What a plan says, against the arrays that training makes and what the compiler says of its program."""

import jax
import numpy as np
import pytest

from shampax.configs import base
from shampax.framework.base.errors import UserError
from shampax.framework.planning import plan_report, planning
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
    """Shampoo on 4 CPU devices, two of which share the parameters, compiled for them."""
    config = make_config(**{"mesh.fsdp": 2, "optimizer.block_size": 32})
    return planning.figures(config, jax.devices()[:4], compiles=True)


def test_bytes_are_those_of_the_compiler(found):
    """Fault: a part of the state is forgotten, counted whole though it is divided, or counted twice."""
    assert found.compiled.arguments == pytest.approx(found.state_bytes, rel=0.02)
    assert found.bytes["parameters"] == 4 * (16 * 32 // 2 + 32 * 64 // 2 + 64 * 16)  # "out" has no "embed" axis
    # 4 blocks of 32 x 32 and 2 of 16 x 32 or so: one momentum and one second moment as large as the blocks held
    held = sum(row["slots on a device"] * np.prod(row["shape"]) * 4 for row in found.blocks)
    diagonal = 4 * 16 * 32 // 2
    assert held <= found.bytes["momentum"] <= held + diagonal
    assert found.bytes["momentum"] == found.bytes["second moments"]
    sides = sum(
        row["slots on a device"] * 4 * sum(np.prod(packed_shape(side)) for side in row["shape"]) for row in found.blocks
    )
    assert found.bytes["statistics"] == pytest.approx(sides, rel=0.01)
    assert found.bytes["roots"] == pytest.approx(sides, rel=0.1)


def test_treatments_and_buckets(found):
    """Fault: parameters are counted under another treatment, or padding is that of blocks without empty slots."""
    assert found.parameters == {"diagonal": (1, 16 * 32), "shampoo": (2, 32 * 64 + 64 * 16)}
    real = 32 * 64 + 64 * 16
    held = sum(4 * row["slots on a device"] * np.prod(row["shape"]) for row in found.blocks)
    padded = sum(4 * row["slots on a device"] * np.prod(row["shape"]) * row["padding"] for row in found.blocks)
    assert held - padded == pytest.approx(real)


def test_collectives_are_counted(found):
    """Fault: the table of traffic is empty, or lacks what carries blocks to their owners."""
    count, size = found.compiled.traffic["all-to-all"]
    assert count >= 2
    assert size > 0


def test_work_is_predicted_without_the_compiler(found):
    """Fault: products of model or optimizer are left out or counted for all devices, or a peak below what is kept."""
    assert found.predicted.flops == pytest.approx(found.model_flops + found.optimizer_flops, rel=0.05)
    assert found.predicted.peak > found.state_bytes
    count, size = found.predicted.traffic["all-to-all"]
    assert (count, size) == pytest.approx(found.compiled.traffic["all-to-all"], rel=0.1)
    assert found.predicted.step_seconds is None  # of a CPU there are no public figures


def test_a_step_takes_time_and_roots_take_cores():
    """Fault: no time for a chip that is on file, utilisation above 1, or roots on the host for nothing."""
    changes = {"optimizer.refresh": "host", "optimizer.interval": 4, "optimizer.delay": 1}
    plan = planning.figures(make_config(**changes), jax.devices()[:2], compiles=False, kind="TPU v5 lite")
    predicted = plan.predicted
    assert predicted.step_seconds == pytest.approx(predicted.compute_seconds + predicted.network_seconds)
    assert 0 < predicted.utilisation < 1
    # one block of 64 x 16 and one of 32 x 64: sides that are solved once in 4 steps, 80 % of the time
    seconds = sum(6.5e-10 * side**3 + 1.5e-7 * side**2 for side in (64, 16, 32, 64))
    assert plan.host_cores == pytest.approx(seconds / 4 / predicted.step_seconds / 0.8, rel=0.1)
    assert plan.fits


def test_other_optimizers_have_bytes_too():
    """Fault: only Shampoo's state has names."""
    plan = planning.figures(make_config(ADAMW), jax.devices()[:2], compiles=False)
    parameters = 4 * (16 * 32 + 32 * 64 + 64 * 16)
    assert (plan.bytes["momentum"], plan.bytes["second moments"]) == (parameters, parameters)
    assert plan.blocks == []
    assert plan.optimizer_flops == 0
    assert plan.compiled is None
    assert plan.fits is None


def test_the_report_names_every_figure(found):
    """Fault: a figure is computed and not shown."""
    text = plan_report.text("a config", found, ["more chips"])
    for word in (
        "a config on 4 x cpu (data 2, fsdp 2)",
        "3,584",
        "statistics",
        "all-to-all",
        "temporaries",
        "all products",
        "activations",
        "no public speeds of cpu",
        "more chips",
    ):
        assert word in text
    for row in found.blocks:
        assert row["name"] in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 6}, "6 is not divisible by 4 data shards"),
        ({"mesh.fsdp": 3}, "4 devices are not divisible by 3"),
        ({"optimizer.treatments": (("hidden.*", "shampoo"),)}, "embed"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes, words):
    """Fault: a plan is made of a config that cannot train."""
    with pytest.raises(UserError, match=words):
        planning.figures(make_config(**changes), jax.devices()[:4], compiles=False)


def test_data_without_shapes_are_refused():
    """Fault: an AttributeError in place of what to write."""
    config = make_config()
    config.data = base.component("toy:ToyData")
    with pytest.raises(UserError, match=r"toy:ToyData does not tell .* spec\(\)"):
        planning.figures(config, jax.devices()[:4], compiles=False)
