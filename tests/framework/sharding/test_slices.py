"""Several slices: the mesh, what crosses the network between them, and runs that move to another number of slices."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import toy
from toy_runs import SHAMPOO, lines, make_config

from shampax.configs import base
from shampax.framework.base.errors import UserError
from shampax.framework.config import components
from shampax.framework.planning import collectives
from shampax.framework.sharding import global_batch, meshes, placement
from shampax.framework.step.program import Program
from shampax.framework.train import train
from shampax.optimizers.exchange import Owners


@dataclasses.dataclass(frozen=True)
class Chip:
    """The parts of a TPU device that its place in a slice needs."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    process_index: int = 0


def chips(*counts):
    """Return the chips of slices with `counts` chips, not in order."""
    found = [(number, i) for number, count in enumerate(counts) for i in range(count)]
    return [Chip(n, (i, 0, 0), number) for n, (number, i) in enumerate(found)][::-1]


def test_the_first_axis_is_the_slice_that_the_chips_tell():
    mesh = meshes.make_mesh({"data": -1, "fsdp": 2}, chips(4, 4), slices=0)
    assert dict(mesh.shape) == {"slice": 2, "data": 2, "fsdp": 2}
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {1}]


@pytest.mark.parametrize(
    ("devices", "slices", "message"),
    [
        (chips(4, 4), 4, "config.slices=4: the devices are on 2 slices. Use 0 or 2."),
        (chips(4, 2), 0, "config.slices=2: the slices have different numbers of devices. Use equal ones."),
        (None, 3, "config.slices=3: does not divide 8 devices. Use a divisor, or 1."),
    ],
)
def test_slices_that_do_not_fit_are_refused(devices, slices, message):
    with pytest.raises(UserError) as error:
        meshes.make_mesh({"data": -1}, devices, slices)
    assert str(error.value) == message


def test_no_array_is_sharded_over_slices():
    with pytest.raises(UserError, match=r'names the mesh axis "slice"\. Use None or one of data, expert, fsdp'):
        placement.mesh_of(config(sharding_rules=(("embed", "slice"), ("mlp", None), ("vocab", None))), jax.devices())


def test_each_slice_owns_all_blocks():
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2}, jax.devices(), slices=2)
    numbers = Owners(mesh).numbers()
    assert [[numbers[device] for device in part.flat] for part in mesh.devices] == [[0, 1, 2, 3]] * 2


def config(**changes):
    optimizer = base.component(SHAMPOO, block_size=8, interval=4, early_intervals=(), ridge=1e-4)
    fixed = {
        "duration": "12 steps",
        "log.every": "1 steps",
        "evaluation.every": "12 steps",
        "mesh.fsdp": 2,
        "slices": 2,
    }
    return make_config(optimizer=optimizer, **fixed | changes)


def test_only_the_reduction_of_gradients_crosses_slices():
    """Faults: blocks move between slices; statistics or roots are gathered over the slow network."""
    chosen = config()
    task, _, options = components.build_all(chosen)
    mesh = placement.mesh_of(chosen, jax.devices())
    with jax.set_mesh(mesh):
        example = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in toy.ToySource(8, 1)[0].items()}
        batch = global_batch.spec(example, chosen.batch_size, mesh)
        program = Program(chosen, task, options, mesh, batch, lambda count: 1e-3)
        text = program.train_step.lower(program.abstract, batch).compile().as_text()
    found = re.findall(
        r"^.* (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(.*$", text, re.M
    )
    assert len(found) > 5
    crossing = [
        line for line in found if any(len({n // 4 for n in group}) > 1 for group in collectives.groups_of(line))
    ]
    assert crossing and all("all-reduce(" in line for line in crossing)
    results = [re.findall(r"f32\[([\d,]*)\]", line.partition(" all-reduce(")[0]) for line in crossing]
    numbers = sum(int(np.prod([int(n) for n in shape.split(",") if n])) for shapes in results for shape in shapes)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(program.abstract.params))
    assert numbers <= parameters + 64


@pytest.mark.slow
@pytest.mark.parametrize("refresh", ["staggered", "host"])
def test_two_slices_train_as_one_and_runs_move_between_them(tmp_path, refresh):
    knobs = {"optimizer.refresh": refresh, "optimizer.phases": 2}  # as many on four owners as on eight
    train(config(slices=1, **knobs), tmp_path / "one")
    result = train(config(**knobs), tmp_path / "two")
    assert result["devices"] == 8
    one, two = (
        {line["step"]: line["train/loss"] for line in lines(tmp_path / name) if "train/loss" in line}
        for name in ("one", "two")
    )
    assert len(one) == 12
    assert two == pytest.approx(one, rel=1e-5)
    longer = {"duration": "16 steps", "may_change": ("duration",)}
    moved = [train(config(slices=n, **knobs, **longer), tmp_path / name) for n, name in ((2, "one"), (1, "two"))]
    assert moved[0]["heldout_loss"] == pytest.approx(moved[1]["heldout_loss"], rel=1e-5)
