import dataclasses
import functools
import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shampax.optimizers import ShampooOptions
from shampax.optimizers.plan import blocks
from shampax.optimizers.plan.blocks import make_plan, parameters
from shampax.optimizers.plan.views import matrix_view, names_by_path, tensor_view

STACK_AXES = {"stack_axes": ("layers", "experts")}
AXES = STACK_AXES | {"fold_axes": ("heads", "kv_heads", "head_dim")}


@pytest.mark.parametrize(
    ("shape", "names", "stack", "stacked", "sides"),
    [
        ((48, 4, 20), ("embed", "heads", "head_dim"), 0, (), ((0,), (1, 2))),
        ((4, 20, 96), ("heads", "head_dim", "embed"), 0, (), ((0, 1), (2,))),
        ((3, 48, 4, 12), ("layers", "embed", "heads", "head_dim"), 0, (0,), ((1,), (2, 3))),
        ((2, 4, 16, 32), ("layers", "experts", "embed", "mlp"), 0, (0, 1), ((2,), (3,))),
        ((16, 5, 32), ("embed", "layers", "mlp"), 0, (1,), ((0,), (2,))),
        ((4, 6, 8, 7), ("embed", "heads", "head_dim", "mlp"), 0, (), ((3,), (0, 1, 2))),
        ((4, 6, 8), ("heads", "embed", "head_dim"), 0, (), ((0,), (1, 2))),
        ((3, 3, 16, 32), None, 0, (), ((3,), (0, 1, 2))),
        ((3, 3, 1, 32), None, 0, (), ((0, 1, 2), (3,))),
        ((3, 3, 16, 32), (None, None, "in", "out"), 0, (), ((3,), (0, 1, 2))),
        ((2, 5, 16, 32), None, 2, (0, 1), ((2,), (3,))),
        ((64, 16), None, 0, (), ((1,), (0,))),
        ((64, 64), None, 0, (), ((0,), (1,))),
    ],
)
def test_matrix_views(shape, names, stack, stacked, sides):
    """Faults: layers or experts are mixed into a matrix; heads are split from head_dim; a longer side comes first."""
    view = matrix_view(shape, names, **AXES, stack=stack)
    assert (view.stack, view.sides, view.is_matrix) == (stacked, sides, True)
    assert view.lengths == tuple(math.prod(shape[axis] for axis in side) for side in sides)
    assert view.stacked == math.prod(shape[axis] for axis in stacked)


@pytest.mark.parametrize("shape", [(4, 8), (3, 4, 8), (5, 8)])
def test_a_parameter_whose_axes_all_fold_is_diagonal(shape):
    """Fault: the biases of queries, keys and values are preconditioned as matrices of heads x head_dim."""
    names = {(4, 8): ("heads", "head_dim"), (3, 4, 8): ("layers", "heads", "head_dim"), (5, 8): ("layers", "kv_heads")}
    plan = make_plan(parameters({"w": np.ones(shape)}, {"w": names[shape]}), ShampooOptions(), {})
    assert plan.buckets == () and list(plan.diagonal) == [0]


NORM = "blocks/norm/scale"


@pytest.mark.parametrize(
    ("path", "shape", "names", "treatments", "warned"),
    [
        (NORM, (3, 64), None, "shampoo", True),
        ("blocks/LayerNorm_0/bias", (3, 64), None, "soap", True),
        ("blocks/query/bias", (3, 4, 16), None, "shampoo", True),
        (NORM, (3, 64), ("layers", "embed"), "shampoo", False),
        (NORM, (3, 64), None, "shampoo stack=1", False),
        (NORM, (3, 64), None, "diagonal", False),
        (NORM, (64,), None, "shampoo", False),
        ("blocks/up/kernel", (3, 64), None, "shampoo", False),
        ("relative_bias/embedding", (8, 32), None, None, False),
    ],
)
def test_a_stack_of_vectors_without_axis_names_is_a_warning(path, shape, names, treatments, warned):
    """Faults: scanned norms become matrices of layers x channels without a word; whoever has said what the axes are is
    warned."""
    options = ShampooOptions(treatments=((".*", treatments),)) if treatments else ShampooOptions()

    def tree(leaf):
        return functools.reduce(lambda inner, name: {name: inner}, path.split("/")[::-1], leaf)

    made = functools.partial(make_plan, parameters(tree(np.ones(shape)), names and tree(names)), options, {})
    if not warned:
        with warnings.catch_warnings(action="error"):
            assert not made().buckets or "kernel" in path
        return
    with pytest.warns(UserWarning, match=rf"parameter '{path}' .*no axis names.*give axis_names, or put .*'diagonal'"):
        assert made().buckets
    options = dataclasses.replace(options, treatments=((blocks._VECTORS, "diagonal"), *options.treatments))
    assert not make_plan(made.args[0], options, {}).buckets


def test_axis_names_have_priority_over_stack():
    """Fault: stack=1 stacks the rows of a parameter that has axis names."""
    assert matrix_view((8, 16), ("embed", "mlp"), **AXES, stack=1).stack == ()
    assert tensor_view((8, 16), ("embed", "mlp"), **STACK_AXES, stack=1).stack == ()


@given(shape=st.lists(st.integers(2, 50), min_size=2, max_size=2))
def test_a_matrix_and_its_transpose_share_a_bucket(shape):
    """Fault: sides keep the order of axes, so that every projection and its inverse need separate programs."""
    view, transpose = (matrix_view(s, None, **AXES) for s in (shape, shape[::-1]))
    assert view.lengths == transpose.lengths == tuple(sorted(shape))
    plan = make_plan(parameters({"w": np.ones(shape), "t": np.ones(shape[::-1])}), ShampooOptions(), {})
    assert len(plan.buckets) == 1


@pytest.mark.parametrize("shape", [(), (7,), (1, 9), (9, 1), (0, 4), (4, 0), (0, 4, 4), (1, 1, 1)])
@pytest.mark.parametrize("view", ["matrix", "tensor"])
@pytest.mark.parametrize("kind", ["shampoo", "one_sided", "one_sided side=left", "one_sided side=right"])
def test_vectors_and_scalars_are_diagonal(shape, view, kind):
    """Fault: a scalar, a vector or an empty array is preconditioned or breaks the plan."""
    options = ShampooOptions(view=view, treatments=((".*", f"{kind} stack={int(len(shape) == 3)}"),))
    plan = make_plan(parameters({"w": np.ones(shape)}), options, {})
    assert plan.buckets == () and list(plan.diagonal) == [0]


@pytest.mark.parametrize(
    ("shape", "names", "stack", "merge_dims", "sides"),
    [
        ((64, 64), None, 0, 4096, ((0,), (1,))),
        ((3, 3, 16, 32), None, 0, 0, ((0,), (1,), (2,), (3,))),
        ((3, 3, 16, 32), None, 0, 9, ((0, 1), (2,), (3,))),
        ((3, 3, 16, 32), None, 0, 144, ((3,), (0, 1, 2))),
        ((3, 3, 16, 32), None, 0, 10**6, ((3,), (0, 1, 2))),
        ((32, 3, 3, 16), None, 0, 144, ((2, 3), (0, 1))),
        ((3, 1, 20), None, 0, 0, ((0,), (2,))),
        ((1, 20, 1, 5), None, 0, 10**6, ((3,), (1,))),
        ((4, 30, 20, 10), ("layers", "a", "b", "c"), 0, 0, ((3,), (2,), (1,))),
        ((2, 4, 8), None, 1, 10**6, ((1,), (2,))),
    ],
)
def test_tensor_views(shape, names, stack, merge_dims, sides):
    """Faults: merging makes a vector of a matrix (64 x 64 with merge_dims 4096); sides have length one or are unsorted;
    a stack axis is a side."""
    view = tensor_view(shape, names, **STACK_AXES, merge_dims=merge_dims, stack=stack)
    assert (view.sides, view.is_matrix) == (sides, True)
    assert sorted([*view.stack, *itertools.chain(*sides)]) == list(range(len(shape)))


@given(shape=st.lists(st.integers(1, 12), max_size=6), merge_dims=st.integers(0, 500), stack=st.integers(0, 2))
def test_merging_is_complete_and_bounded(shape, merge_dims, stack):
    """Faults: an axis is lost; sides merge across another; a side exceeds merge_dims; mergeable neighbours are not
    merged."""
    view = tensor_view(shape, None, **STACK_AXES, merge_dims=merge_dims, stack=stack)
    expected = [axis for axis in range(len(shape)) if axis >= stack and shape[axis] != 1]
    in_order = sorted(view.sides)
    assert list(itertools.chain(*in_order)) == expected
    assert view.stacked * math.prod(view.lengths) == math.prod(shape)
    assert view.lengths == tuple(sorted(view.lengths))
    assert len(view.sides) == len(expected) or len(view.sides) >= 2
    assert all(view.length(side) <= merge_dims for side in view.sides if len(side) > 1)
    if len(view.sides) > 2:
        assert all(view.length((*a, *b)) > merge_dims for a, b in itertools.pairwise(in_order))


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(2, 9), min_size=2, max_size=3),
    side=st.sampled_from(["left", "right", "short"]),
    named=st.booleans(),
)
def test_one_sided_finds_its_side_after_the_swap(shape, side, named):
    """Fault: `left` is read as "the first side". The shorter side comes first, which is the right side of a tall
    matrix."""
    axes = (["heads", "head_dim", "embed"] if named else ["a", "b", "c"])[-len(shape) :]
    options = ShampooOptions(treatments=((".*", f"one_sided side={side}"),))
    (bucket,) = make_plan(parameters({"w": np.ones(shape)}, {"w": tuple(axes)}), options, {}).buckets
    view = bucket.leaves[0].view
    (chosen,) = (view.sides[i] for i in bucket.sides)
    left, right = tuple(range(len(shape) - 1)), (len(shape) - 1,)
    expected = {"left": left, "right": right}.get(side)
    assert chosen == expected if expected else view.length(chosen) == min(view.lengths)


def test_names_by_path():
    """Fault: names are read leaf by leaf, or under other paths than the parameters."""
    assert names_by_path(None) == {}
    tree = {"a": {"kernel": ("embed", None)}, "b": [("mlp",), ()]}
    assert names_by_path(tree) == {"a/kernel": ("embed", None), "b/0": ("mlp",), "b/1": ()}
