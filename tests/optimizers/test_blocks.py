import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shampax.optimizers.blocks import cut, from_blocks, make_plan, to_blocks
from shampax.optimizers.options import ShampooOptions
from shampax.optimizers.views import matrix_view

AXES = {"stack_axes": ("layers",), "fold_axes": ("heads", "kv")}


def plan(params, devices=1, names=None, **options):
    return make_plan(params, names, ShampooOptions(**options), devices)


@given(side=st.integers(1, 5000), block_size=st.integers(1, 512).map(lambda b: 8 * b))
def test_cut_is_even_and_covers(side, block_size):
    """Catches full blocks with a sliver, an empty last block, or a block beyond the block size."""
    pieces, length = cut(side, block_size)
    assert pieces == math.ceil(side / block_size)
    assert length <= block_size and length % 8 == 0
    assert pieces * length >= side > (pieces - 1) * length
    assert length <= max(8 * math.ceil(side / pieces / 8), 17 / 16 * math.ceil(side / pieces) + 1)


@settings(deadline=None, max_examples=30)
@given(
    shape=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    block_size=st.sampled_from([8, 16, 64]),
    seed=st.integers(0, 9),
)
def test_blocks_round_trip(shape, block_size, seed):
    """Catches a wrong transpose, fold or padding; the padding must be zero."""
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32) + 10
    for bucket in plan({"w": x}, block_size=block_size, treatments=((".*", "shampoo"),)).buckets:
        (leaf,) = bucket.leaves
        blocks = to_blocks(jnp.asarray(x), leaf, bucket)
        assert blocks.shape == (leaf.blocks, bucket.rows * bucket.cols)
        assert np.count_nonzero(blocks) == x.size
        np.testing.assert_array_equal(from_blocks(blocks, leaf, bucket), x)
        sizes = bucket.real_sizes()
        assert np.prod(sizes, axis=1).sum() == x.size


@pytest.mark.parametrize(
    ("shape", "names", "stack", "rows", "cols"),
    [
        ((3, 48, 4, 12), ("layers", "embed", "heads", "kv"), 3, 48, 48),
        ((3, 4, 12, 64), ("layers", "heads", "kv", "embed"), 3, 48, 64),
        ((3, 48, 100), ("layers", "embed", "mlp"), 3, 48, 100),
        ((3, 3, 16, 32), None, 1, 32, 144),
        ((64, 64), None, 1, 64, 64),
        ((7,), None, 1, 1, 7),
    ],
)
def test_matrix_views(shape, names, stack, rows, cols):
    """Catches stacked layers mixed into a matrix, or heads split from head_dim."""
    view = matrix_view(shape, names, **AXES)
    assert (view.stack, view.rows, view.cols) == (stack, rows, cols)


def test_names_must_fit():
    """Catches axis names of another parameter."""
    with pytest.raises(ValueError, match="have 1 entries"):
        matrix_view((2, 3), ("embed",), **AXES)


def test_vectors_scalars_and_empty_parameters_are_diagonal():
    """Catches a plan that tries to precondition what is no matrix."""
    params = {"scalar": np.ones(()), "vector": np.ones(5000), "empty": np.ones((0, 4)), "row": np.ones((1, 9))}
    assert plan(params).buckets == () and len(plan(params).diagonal) == 4


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    devices=st.sampled_from([1, 2, 3, 4, 8, 16]),
    interval=st.sampled_from([1, 3, 10, 20]),
)
def test_owners_and_phases(counts, devices, interval):
    """Catches a block without an owner, an unfair share, an uneven schedule, or one that depends on the devices."""
    params = {f"w{i}": jax.ShapeDtypeStruct((n, 8, 16 + 8 * i), jnp.float32) for i, n in enumerate(counts)}
    treatments = ((".*", "shampoo stack=1"),)
    here = plan(params, devices, interval=interval, treatments=treatments)
    alone = plan(params, 1, interval=interval, treatments=treatments)
    load = np.zeros((devices, interval), int)
    for bucket, single in zip(here.buckets, alone.buckets, strict=True):
        owned = bucket.slots[bucket.slots < bucket.blocks]
        assert sorted(owned) == list(range(bucket.blocks))
        np.testing.assert_array_equal(bucket.slots.reshape(-1)[bucket.slot_of_block], np.arange(bucket.blocks))
        assert bucket.slots.shape[1] <= math.ceil(bucket.blocks / devices) + 1
        width = bucket.slots.shape[1]
        for phase in range(interval):
            due = [
                bucket.slots[device, slot]
                for device in range(devices)
                for slot in bucket.due[device, phase]
                if slot < width
            ]
            assert sorted(due) == sorted(single.slots[0, s] for s in single.due[0, phase] if s < single.slots.shape[1])
        load += (bucket.due < width).sum(axis=2)
    assert load.max(axis=1).max() - load.min(axis=1).min() <= 1
    assert load.sum() == sum(counts)


def test_the_plan_prints_treatments():
    """Catches a table that does not say what each parameter gets."""
    params = {"embedding": np.ones((100, 8)), "up": np.ones((8, 40)), "down": np.ones((40, 8)), "bias": np.ones(8)}
    rules = ((".*embed.*", "diagonal"), ("down", "one_sided exponent=0.5 block_size=24"), (".*", "shampoo"))
    assert plan(params, treatments=rules).treatments == {
        "embedding": "diagonal (adam)",
        "up": "shampoo 8x40 x1",
        "down": "one_sided 8x24 x2",
        "bias": "diagonal (adam)",
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"treatments": ((".*", "shampo"),)}, "must begin with one of"),
        ({"treatments": ((".*", "shampoo block=3"),)}, "it may set"),
        ({"treatments": ((".*", "shampoo block_size=x"),)}, "needs a int"),
        ({"exponent": 0.3}, "nearest is 1/3"),
        ({"beta2": 1.5}, "between"),
        ({"beta2": 1.0}, "use graft 'adagrad'"),
        ({"ridge": 1e-6, "cut": 1e-6}, "set one of them to 0"),
        ({"solver": "host"}, "choose one of newton, eigh"),
        ({"interval": 0}, "at least 1"),
        ({"exponent": 3.0}, "nearest is 1/1"),
        ({"epsilon": 0.0}, "divides 0 by 0"),
        ({"treatments": (("(", "shampoo"),)}, "not a regular expression"),
        ({"treatments": ((".*", "shampoo stack=-1"),)}, "none may be negative"),
    ],
)
def test_bad_options(options, words):
    """Catches options that would fail late, or not at all."""
    with pytest.raises(ValueError, match=words):
        ShampooOptions(**options)


def test_an_uncovered_path_is_named():
    """Catches a parameter that silently gets no treatment."""
    with pytest.raises(ValueError, match="'w' is matched by none"):
        plan({"w": np.ones((8, 8))}, treatments=(("v", "shampoo"),))
