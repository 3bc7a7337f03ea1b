import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpy_blocks
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shampax.optimizers import ShampooOptions
from shampax.optimizers.plan.blocks import make_plan, parameters, split


def shape_of(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# The options that the expectations below depend on.
FIXED = {"block_size": 1024, "exponent": None, "ridge": 1e-6, "cut": 0.0, "beta2": 0.99, "interval": 20}


def plan(params, names=None, specs=None, mesh=None, **options):
    return make_plan(parameters(params, names, specs), ShampooOptions(**(FIXED | options)), mesh or {})


def everything(text):
    return ((".*", text),)


@settings(max_examples=500)
@given(side=st.integers(1, 20_000), block_size=st.integers(1, 4096))
def test_blocks_are_even_and_cover_the_side(side, block_size):
    """Faults: full blocks are followed by a sliver; a block is larger than the block size; the last block is only
    padding."""
    pieces, length = split(side, block_size)
    assert pieces == math.ceil(side / block_size)
    assert length <= block_size
    assert pieces * length >= side > (pieces - 1) * length


@settings(max_examples=500)
@given(side=st.integers(1, 20_000), block_size=st.integers(1, 4096))
def test_padding_is_bounded(side, block_size):
    """Fault: sides are rounded to powers of two, so that 1030 becomes 2048, with four times the memory."""
    pieces, length = split(side, block_size)
    even = math.ceil(side / pieces)
    assert even <= length <= even * 17 / 16
    assert length % 8 == 0 or length < 128 or length == block_size


@pytest.mark.parametrize(
    ("side", "block_size", "expected"),
    [
        (1, 1024, (1, 1)),
        (15, 1024, (1, 15)),
        (17, 1024, (1, 17)),
        (33, 1024, (1, 34)),
        (768, 1024, (1, 768)),
        (1024, 1024, (1, 1024)),
        (1025, 1024, (2, 544)),
        (3072, 1024, (3, 1024)),
        (50257, 1024, (50, 1024)),
        (100, 33, (4, 25)),
        (7, 3, (3, 3)),
    ],
)
def test_block_lengths_of_known_sides(side, block_size, expected):
    """Fault: the rounding differs from that of existing checkpoints."""
    assert split(side, block_size) == expected


def test_few_lengths():
    """Fault: every width has its own bucket, and so a compiled root solver."""
    lengths = {split(side, 1024)[1] for side in range(16, 20_000)}
    assert len(lengths) <= 6 * 16 + 1


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(2, 60), min_size=2, max_size=3),
    neighbours=st.lists(st.lists(st.integers(2, 60), min_size=2, max_size=3), max_size=3),
    block_size=st.integers(1, 8).map(lambda b: 8 * b),
    devices=st.integers(1, 12),
)
def test_blocks_depend_only_on_their_parameter(shape, neighbours, block_size, devices):
    """Fault: blocks depend on other parameters or the mesh. A checkpoint names a block by path and coordinates."""
    options = {"block_size": block_size, "treatments": everything("shampoo")}
    alone = plan({"w": shape_of(*shape)}, **options)
    others = {f"{'az'[i % 2]}{i}": shape_of(*other) for i, other in enumerate(neighbours)}
    params = {"w": shape_of(*shape)} | others
    specs = {name: PartitionSpec("x" if x.shape[0] % devices == 0 else None) for name, x in params.items()}
    together = plan(params, specs=specs, mesh={"x": devices}, **options)
    (bucket,) = alone.buckets
    (there, leaf) = next((b, leaf) for b in together.buckets for leaf in b.leaves if leaf.path == "w")
    assert (there.name, there.shape, there.sides, there.p) == (bucket.name, bucket.shape, bucket.sides, bucket.p)
    assert leaf.view == bucket.leaves[0].view
    assert (leaf.tiling.pieces, leaf.tiling.block) == (bucket.leaves[0].tiling.pieces, bucket.leaves[0].tiling.block)
    assert together.treatments["w"] == alone.treatments["w"]


def test_rules_separate_buckets():
    """Faults: blocks with different treatments share a bucket, and so a root solver; names of buckets, which are keys
    of checkpoints, repeat or are not file names."""
    rules = (
        ("plain.*", "shampoo"),
        ("size", "shampoo block_size=8"),
        ("exponent", "shampoo exponent=0.5"),
        ("third", f"shampoo exponent={1 / 3}"),
        ("none", "shampoo exponent=0"),
        ("ridge", "shampoo ridge=1e-4"),
        ("close", "shampoo ridge=1.0000001e-4"),
        ("huge", "shampoo ridge=1e20"),
        ("cut", "shampoo cut=1e-4"),
        ("more", "shampoo cut=1e-3"),
        ("beta", "shampoo beta2=0.9"),
        ("left", "one_sided side=left"),
        ("right", "one_sided side=right"),
        ("tensor", "shampoo view=tensor"),
    )
    params = {pattern.removesuffix(".*"): shape_of(16, 24) for pattern, _ in rules} | {"plain too": shape_of(24, 16)}
    params["tensor"] = shape_of(4, 4, 16, 24)
    result = plan(params, treatments=rules, solver="eigh")
    paths = {bucket.name: {leaf.path for leaf in bucket.leaves} for bucket in result.buckets}
    assert len(paths) == len(result.buckets) == len(rules)
    assert all(re.fullmatch(r"[\w.\-]+", name) for name in paths)
    assert {"plain", "plain too"} in paths.values()
    groups = {leaf.path: bucket for bucket in result.buckets for leaf in bucket.leaves}
    assert (groups["plain"].sides, groups["plain"].p, groups["plain"].shape) == ((0, 1), 4, (16, 24))
    assert groups["size"].shape == (8, 8)
    assert (groups["exponent"].p, groups["third"].p) == (2, 3)
    assert (groups["left"].sides, groups["right"].sides, groups["left"].p) == ((0,), (1,), 2)
    assert (groups["ridge"].ridge, groups["ridge"].cut) == (1e-4, 0)
    assert (groups["cut"].ridge, groups["cut"].cut) == (0, 1e-4)
    assert groups["beta"].beta2 == 0.9
    assert (groups["tensor"].sides, groups["tensor"].p, groups["tensor"].shape) == ((0, 1, 2, 3), 8, (4, 4, 16, 24))


@pytest.mark.parametrize("text", ["shampoo exponent=0", "one_sided side=right exponent=0", "shampoo"])
def test_exponent_zero_preconditions_no_side(text):
    """Fault: statistics are kept and roots computed for an exponent of zero."""
    (bucket,) = plan({"w": shape_of(16, 24)}, treatments=everything(text), exponent=0.0).buckets
    assert (bucket.sides, bucket.p, bucket.shape) == ((), 0, (16, 24))


def transformer(layers, width, *, scanned):
    """Return shapes and axis names of a decoder with gated feed-forward layers, 64-dimensional heads and 50257
    tokens."""
    heads, mlp = width // 64, 8 * width // 3 // 128 * 128
    layer = {
        "query": ((width, heads, 64), ("embed", "heads", "head_dim")),
        "key": ((width, heads // 2, 64), ("embed", "kv_heads", "head_dim")),
        "value": ((width, heads // 2, 64), ("embed", "kv_heads", "head_dim")),
        "out": ((heads, 64, width), ("heads", "head_dim", "embed")),
        "gate": ((width, mlp), ("embed", "mlp")),
        "up": ((width, mlp), ("embed", "mlp")),
        "down": ((mlp, width), ("mlp", "embed")),
        "norm": ((width,), ("embed",)),
    }
    if scanned:
        stack = {name: ((layers, *shape), ("layers", *axes)) for name, (shape, axes) in layer.items()}
    else:
        stack = {f"layer{i}": dict(layer) for i in range(layers)}
    tree = {"embedding": ((50257, width), ("vocab", "embed")), "layers": stack}
    tree["head"] = ((width, 50257), ("embed", "vocab"))

    def split(node, i):
        if isinstance(node, dict):
            return {key: split(value, i) for key, value in node.items()}
        return node[1] if i else shape_of(*node[0])

    return split(tree, 0), split(tree, 1)


@pytest.mark.parametrize("width", [512, 768, 1024, 1536])
@pytest.mark.parametrize("scanned", [False, True])
def test_a_transformer_has_few_buckets(width, scanned):
    """Faults: there is a bucket, and so a compiled root solver, per layer or projection; layers are not stacked."""
    result = plan(*transformer(12, width, scanned=scanned), mesh={"x": 8})
    unrolled = plan(*transformer(12, width, scanned=False), mesh={"x": 8})
    assert len(result.buckets) <= 4
    assert [(b.name, b.blocks) for b in result.buckets] == [(b.name, b.blocks) for b in unrolled.buckets]
    assert len(result.diagonal) == 1 + (1 if scanned else 12)


@st.composite
def models(draw):
    """Draw (parameters, rules, specs that mesh axis "x" allows or not): stacks of matrices with a few blocks each."""
    sides = st.sampled_from([8, 12, 16, 24, 40])
    params, rules = {}, []
    for i in range(draw(st.integers(1, 4))):
        name = f"w{i}"
        params[name] = shape_of(draw(st.integers(1, 20)), draw(sides), draw(sides))
        word = draw(st.sampled_from(["", "block_size=8", "exponent=0.5", "beta2=0.9"]))
        rules.append((name, f"{draw(st.sampled_from(['shampoo', 'one_sided']))} stack=1 {word}"))
    axis = draw(st.integers(0, 3))
    specs = {name: PartitionSpec(*[None] * axis, "x") if axis < 3 else PartitionSpec() for name in params}
    return params, tuple(rules), specs


@settings(deadline=None, max_examples=60)
@given(
    model=models(),
    devices=st.integers(1, 12),
    interval=st.integers(1, 30),
    share=st.integers(0, 4),
    refresh=st.sampled_from(["staggered", "staggered", "host"]),
)
def test_owners_and_phases(model, devices, interval, share, refresh):
    """Faults: a block has no owner or two; shares are unequal; a block is due never or twice in an interval; a step has
    more refreshes than another; the schedule depends on the number of devices."""
    params, rules, specs = model
    options = {"treatments": rules, "interval": interval, "refresh": refresh, "block_size": 16, "early_intervals": ()}
    options |= {"phases": interval * share // 4, "delay": 0}
    here = plan(params, specs=specs, mesh={"x": devices}, **options)
    blocks = sum(bucket.blocks for bucket in here.buckets)
    phases = options["phases"] or min(interval, math.ceil(blocks / devices))
    phases = interval if refresh == "host" else phases
    alone = plan(params, **options | {"phases": phases})
    load, first = np.zeros((devices, phases), int), 0
    for bucket, single in zip(here.buckets, alone.buckets, strict=True):
        width = bucket.slots.shape[1]
        assert bucket.slots.shape == (devices, math.ceil(bucket.blocks / devices))
        owned = [slots[slots < bucket.blocks] for slots in bucket.slots]
        assert sorted(np.concatenate(owned)) == list(range(bucket.blocks))
        assert max(map(len, owned)) - min(map(len, owned)) <= 1
        np.testing.assert_array_equal(bucket.slots.reshape(-1)[bucket.slot_of_block], np.arange(bucket.blocks))
        np.testing.assert_array_equal(bucket.slot_of_block // width, bucket.owner)
        assert bucket.due.shape[:2] == (devices, phases) and bucket.due.max() <= width
        due = np.full(bucket.blocks, -1)
        for device, phase, at in np.argwhere(bucket.due < width):
            block = bucket.slots[device, bucket.due[device, phase, at]]
            assert due[block] == -1
            due[block] = phase
        assert bucket.first == first
        np.testing.assert_array_equal(due, (first + np.arange(bucket.blocks)) * phases // blocks)
        np.testing.assert_array_equal(single.slots, np.arange(bucket.blocks)[None])
        assert (single.first, single.blocks, single.phases) == (first, bucket.blocks, phases)
        load += (bucket.due < width).sum(axis=2)
        first += bucket.blocks
    assert load.sum() == first
    assert load.max() - load.min() <= 1


@settings(deadline=None, max_examples=25)
@given(model=models(), devices=st.integers(1, 6))
def test_tables_of_slots(model, devices):
    """Faults: a slot is assigned to the matrix of another; norms and roots include padding."""
    params, rules, specs = model
    for bucket in plan(params, specs=specs, mesh={"x": devices}, treatments=rules, block_size=16).buckets:
        ones, matrices, count = [], [], 0
        for leaf in bucket.leaves:
            shape = leaf.view.shape
            layout = leaf.view, leaf.tiling.pieces, leaf.tiling.block
            ones.append(numpy_blocks.cut(np.ones(shape), *layout))
            number = np.arange(shape[0]) + count
            matrices.append(numpy_blocks.cut(np.broadcast_to(number[:, None, None], shape), *layout))
            count += shape[0]
        real = np.concatenate([*ones, np.zeros((1, *bucket.shape))])
        matrix = np.concatenate([*matrices, np.zeros((1, *bucket.shape))]).max(axis=(1, 2))
        matrix[-1] = count
        slots = bucket.slots.reshape(-1)
        sizes = np.stack([real.any(axis=2).sum(axis=1), real.any(axis=1).sum(axis=1)], axis=1)
        np.testing.assert_array_equal(bucket.real_sizes, sizes[slots])
        np.testing.assert_array_equal(bucket.matrix_of_slot, matrix[slots])
        assert bucket.matrices == count + 1


def test_the_plan_prints_treatments():
    """Fault: the table lacks the treatment of a parameter."""
    params = {
        "embedding": shape_of(100, 8),
        "up": shape_of(8, 40),
        "down": shape_of(40, 8),
        "left": shape_of(40, 8),
        "still": shape_of(8, 8),
        "bias": shape_of(8),
    }
    rules = (
        (".*embed.*", "diagonal"),
        ("down", "shampoo exponent=0.5 block_size=24"),
        ("left", "one_sided side=left"),
        ("still", "shampoo exponent=0"),
        (".*", "shampoo"),
    )
    assert plan(params, treatments=rules).treatments == {
        "embedding": "diagonal (adam)",
        "up": "shampoo 8x40 p4 x1",
        "down": "shampoo 8x20 p2 x2",
        "left": "one_sided 8x40* p2 x1",
        "still": "shampoo 8x8 momentum x1",
        "bias": "diagonal (adam)",
    }


def test_diagonal_parameters_use_the_beta2_of_their_rule():
    """Fault: only statistics use a rule's beta2."""
    params = {"a": shape_of(8), "b": shape_of(8, 8), "c": shape_of(8, 8)}
    rules = (("a", "shampoo beta2=0.9"), ("b", "diagonal beta2=0.8"), (".*", "diagonal"))
    assert {i: leaf.beta2 for i, leaf in plan(params, treatments=rules).diagonal.items()} == {0: 0.9, 1: 0.8, 2: 0.99}


def test_shardings_are_accepted_as_specs():
    """Fault: only PartitionSpecs are accepted, although a trainer has shardings."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    params, spec = {"w": shape_of(16, 16)}, PartitionSpec("x", None)
    by_spec = plan(params, specs={"w": spec}, mesh=mesh.shape)
    by_sharding = plan(params, specs={"w": NamedSharding(mesh, spec)}, mesh=mesh.shape)
    assert by_spec.buckets[0].leaves[0].tiling == by_sharding.buckets[0].leaves[0].tiling
    assert by_spec.buckets[0].leaves[0].tiling.sharded == ((0, ("x",)),)


X = PartitionSpec("x")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"treatments": (("v", "shampoo"),)}, "'w': must match one of 'v'. End the list with"),
        ({"names": {"v": ("embed", "mlp")}}, "'w': must have an entry in axis_names"),
        ({"specs": {"v": X}, "mesh": {"x": 2}}, "'w': must have an entry in param_specs"),
        ({"names": {"w": ("embed",)}}, r"'w': axis_names=\('embed',\) has 1 .*\(8, 16\) has 2"),
        ({"names": {"w": ("embed",)}, "view": "tensor"}, r"'w': axis_names=\('embed',\) has 1 .*\(8, 16\) has 2"),
        ({"specs": {"w": PartitionSpec(None, None, "x")}, "mesh": {"x": 2}}, "'w'.*3.*2"),
        ({"specs": {"w": PartitionSpec("y")}, "mesh": {"x": 2}}, "'w'.*'y'.*x"),
        ({"specs": {"w": X}}, "'w'.*'x'"),
        ({"specs": {"w": PartitionSpec("y")}, "mesh": {"x": 2}, "treatments": everything("diagonal")}, "'w'.*'y'.*x"),
    ],
)
def test_errors_name_what_does_not_match(arguments, words):
    """Faults: a parameter gets no treatment without an error; names or specs of another model or mesh give a KeyError
    or IndexError."""
    with pytest.raises(ValueError, match=words):
        plan({"w": shape_of(8, 16)}, **arguments)
