import dataclasses
import math
from types import SimpleNamespace

import jax
import pytest
from jax.sharding import PartitionSpec as P

from shampax.framework.base.errors import UserError
from shampax.framework.sharding import meshes, placement
from shampax.models import layout

RULES = (("vocab", "tensor"), ("mlp", ("fsdp", "tensor")), ("embed", "fsdp"), ("norm", None))


def mesh(data=1, fsdp=1, tensor=1, devices=None):
    return meshes.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, devices)


def test_minus_one_takes_the_rest():
    assert dict(mesh(data=-1, tensor=2).shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert dict(mesh(fsdp=-1, devices=jax.devices()[:2]).shape) == {"data": 1, "fsdp": 2, "tensor": 1}
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh(data=-1).axis_types)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 16}, ["16x1x1", "needs 16 devices, but there are 8"]),
        ({"data": 2}, ["2x1x1", "uses 2 of 8 devices", "-1"]),
        ({"data": -1, "fsdp": 3}, ["-1x3x1", "8 devices are not divisible by 3", "1, 2, 4, 8"]),
        ({"data": -1, "fsdp": -1}, ["-1x-1x1", "at most one can be -1"]),
        ({"data": 0}, ["0x1x1", "at least 1"]),
    ],
)
def test_mesh_errors_carry_both_numbers_and_the_fix(sizes, words):
    with pytest.raises(UserError) as error:
        mesh(**sizes)
    assert all(word in str(error.value) for word in words), str(error.value)


@dataclasses.dataclass(frozen=True)
class Chip:
    """The parts of a TPU device that its place in the network needs."""

    id: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    process_index: int = 0


def test_an_axis_of_the_network_is_split_if_needed():
    """Faults: a slice of 4 x 4 chips cannot have a mesh axis of 2; neighbours on an axis are far apart."""
    chips = [Chip(4 * y + x, (x, y, 0)) for y in range(4) for x in range(4)]
    for sizes in ({"data": 4, "fsdp": 4}, {"data": 8, "tensor": 2}, {"data": 2, "fsdp": 4, "tensor": 2}):
        found = mesh(**sizes, devices=chips)
        assert {chip.id for chip in found.devices.flat} == set(range(16))
        for first, second in found.devices.reshape(-1, sizes.get("tensor", 1))[:, :2] if "tensor" in sizes else []:
            assert sum(abs(a - b) for a, b in zip(first.coords, second.coords, strict=True)) == 1


@pytest.mark.parametrize(
    ("batch", "microbatches", "message"),
    [
        (100, 1, "config.batch_size=100: must be divisible by 8 data shards. Use 96 or 104."),
        (24, 2, "config.batch_size=24: must be divisible by 8 data shards x 2 microbatches = 16. Use 16 or 32."),
        (4, 1, "config.batch_size=4: must be divisible by 8 data shards. Use 8."),
    ],
)
def test_batch_errors_carry_both_numbers_and_the_fix(batch, microbatches, message):
    with pytest.raises(UserError) as error:
        meshes.check_batch(batch, microbatches, mesh(data=2, fsdp=4))
    assert str(error.value) == message


def test_the_expert_axis_divides_the_batch_and_the_sequence_axis_does_not():
    """Faults: all devices along `expert` get the same examples; rows of T + 1 tokens are cut over `sequence`."""
    grid = meshes.make_mesh({"data": 1, "expert": 2, "fsdp": 2, "sequence": 2, "tensor": 1})
    assert meshes.batch_sharding(grid).spec == P(("data", "fsdp", "expert"))
    assert layout.BATCH_AXES == meshes.BATCH_AXES
    meshes.check_batch(4, 1, grid)
    with pytest.raises(UserError, match="batch_size=2: must be divisible by 4 data shards"):
        meshes.check_batch(2, 1, grid)


def test_tensor_axis_does_not_divide_the_batch():
    meshes.check_batch(2, 1, mesh(data=2, tensor=4))
    assert meshes.batch_sharding(mesh(data=2, tensor=4)).spec == P(("data", "fsdp"))


@pytest.mark.parametrize(
    ("shape", "names", "spec", "notes"),
    [
        ((32, 16), ("vocab", "embed"), P("tensor", "fsdp"), ()),
        ((16, 32), ("embed", "mlp"), P("fsdp", "tensor"), ("mlp: fsdp already used",)),
        ((32, 7), ("mlp", None), P(("fsdp", "tensor")), ()),
        ((10, 4), ("vocab", "norm"), P("tensor"), ()),
        ((9, 8), ("vocab", "embed"), P(None, "fsdp"), ("vocab: 9 not divisible by 2 (tensor)",)),
        ((3,), ("embed",), P(), ("embed: 3 not divisible by 4 (fsdp)",)),
        ((4,), ("mlp",), P("fsdp"), ("mlp: 4 not divisible by 8 (tensor)",)),
        ((), (), P(), ()),
    ],
)
def test_rules_fall_back_to_replication_with_a_warning(shape, names, spec, notes):
    placed = placement.place(shape, names, RULES, mesh(fsdp=4, tensor=2))
    assert (placed.spec, placed.notes) == (spec, notes)


def test_axes_of_size_one_do_not_shard():
    placed = placement.place((9, 9), ("vocab", "embed"), RULES, mesh(data=8))
    assert placed == placement.Placement(P(), ())
    assert placement.describe(placed.spec) == "replicated"
    assert placement.describe(P(None, ("fsdp", "tensor"))) == "-,fsdp+tensor"


def test_name_without_a_rule_and_wrong_rank_name_the_parameter():
    leaf = jax.ShapeDtypeStruct((4, 4), "float32")
    no_rule = r'parameter a/b: logical axis "layers" has no rule.*Add \("layers", None\)'
    with pytest.raises(UserError, match=no_rule):
        placement.place_all({"a": {"b": leaf}}, {"a": {"b": ("layers", "mlp")}}, RULES, mesh(data=8))
    with pytest.raises(UserError, match=r"parameter a: .*name 1 dimensions, but the shape \(4, 4\) has 2"):
        placement.place_all({"a": leaf}, {"a": ("mlp",)}, RULES, mesh(data=8))


def test_rule_for_an_axis_the_mesh_lacks():
    with pytest.raises(UserError, match=r'"moe" names the mesh axis "expert". Use None or one of data'):
        placement.mesh_of(SimpleNamespace(mesh={"data": 8}, slices=1, sharding_rules=(("moe", "expert"),)), None)


def test_every_element_is_on_exactly_its_devices():
    array = jax.numpy.arange(32 * 16).reshape(32, 16)
    grid = mesh(fsdp=4, tensor=2)
    placements = placement.place_all({"w": array}, {"w": ("vocab", "embed")}, RULES, grid)
    shardings = placement.shardings({"w": array}, placements, grid)
    laid = jax.device_put({"w": array}, shardings)["w"]
    assert {shard.data.shape for shard in laid.addressable_shards} == {(16, 4)}
    assert sum(math.prod(shard.data.shape) for shard in laid.addressable_shards) == array.size


def test_a_large_array_is_not_replicated_silently():
    """Faults: a table of gigabytes is replicated without a word; an axis that shards another dimension is refused."""
    mesh = meshes.make_mesh({"fsdp": 4, "tensor": 2})
    rules = (("vocab", "tensor"), ("embed", "fsdp"), ("out", "fsdp"), ("layers", None))
    table = {"table": jax.ShapeDtypeStruct((50_257, 512), "float32")}
    message = (
        r"parameter table: vocab: 50257 not divisible by 2 \(tensor\), so that 103 MB would be replicated along this "
        r"axis. Change the size or config.mesh, or put \('vocab', None\) first in config.sharding_rules"
    )
    with pytest.raises(UserError, match=message):
        placement.place_all(table, {"table": ("vocab", "embed")}, rules, mesh)
    placed = placement.place_all(table, {"table": ("vocab", "embed")}, (("vocab", None), *rules), mesh)
    assert placed["table"].spec == P(None, "fsdp")
    assert placement.place_all(table, {"table": ("out", "embed")}, rules, mesh)["table"].spec == P(None, "fsdp")
