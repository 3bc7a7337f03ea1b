import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lm_cases import SMALL, assert_close, batch_of, grad_of, quick_jit, spec_of, value_and_grad, variables_of
from traced import equations

from shampax.framework.planning import collectives
from shampax.models import attention, layout
from shampax.models.kernels import attention as kernels


def test_attention_against_jax():
    """Faults: a wrong scale or softmax axis; query heads use other key heads."""
    random = np.random.default_rng(0)
    shapes = [(2, 7, 6, 8), (2, 7, 3, 8), (2, 7, 3, 8)]
    query, key, value = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    visible = np.tril(np.ones((2, 7, 7), bool))
    expected = quick_jit(jax.nn.dot_product_attention)(query, key, value, mask=visible[:, None])
    assert_close(quick_jit(attention.attend)(query, [key], [value], visible), expected, 1e-5)


@pytest.mark.parametrize("block", [3, 50])
def test_blockwise_attention_equals_the_whole(block):
    """Faults: a block masks its queries as the first ones; a short last block is wrong."""
    task = dataclasses.replace(SMALL, attention_block=block)
    variables, batch = variables_of(SMALL), batch_of()
    assert_close(grad_of(SMALL, variables, batch), grad_of(task, variables, batch), 1e-5)


def random_input(length, dtype="float32"):
    """Return query, key, value and segments of one row; 4 heads share 2 key-value heads."""
    random = np.random.default_rng(0)
    shapes = [(1, length, 4, 8), (1, length, 2, 8), (1, length, 2, 8)]
    return *(random.normal(size=shape).astype(dtype) for shape in shapes), np.ones((1, length), np.int32)


def test_blockwise_attention_in_bfloat16():
    """Fault: the gradients of keys and values are summed over blocks in bfloat16."""
    arrays = random_input(96)
    half = tuple(jnp.asarray(x, jnp.bfloat16) for x in arrays[:3])

    def total(query, key, value, block):
        return (attention.attention(query, key, value, arrays[3], block=block).astype(jnp.float32) ** 2).sum()

    grads = quick_jit(jax.value_and_grad(total, argnums=(0, 1, 2)), static_argnums=3)
    exact, found = grads(*arrays[:3], 0), grads(*half, 16)
    for x, y in zip(jax.tree.leaves(exact), jax.tree.leaves(found), strict=True):
        assert np.linalg.norm(x - np.asarray(y, np.float32)) < 0.01 * np.linalg.norm(x)


def peak(block, length):
    def total(*arrays):
        return attention.attention(*arrays, block=block).sum()

    compiled = quick_jit(jax.grad(total, argnums=(0, 1, 2))).lower(*random_input(length)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_blockwise_attention_is_linear_in_the_length():
    """Fault: scores of all blocks are kept for the backward pass."""
    whole, blocks = ([peak(block, length) for length in (256, 1024)] for block in (0, 32))
    assert whole[1] > 8 * whole[0]
    assert blocks[1] < 5 * blocks[0]
    assert blocks[1] < whole[1] / 8


def test_masks_of_blocks_are_not_kept():
    """Fault: a scan over layers precomputes the masks of all blocks, T x S for every row and layer."""
    task = dataclasses.replace(SMALL, attention_block=4, remat="full")
    batch = batch_of()
    abstract = jax.eval_shape(task.init, jax.random.key(0), spec_of(batch))
    jaxpr = jax.make_jaxpr(functools.partial(value_and_grad, task))(abstract, batch).jaxpr
    masks = {var.aval.shape for eqn in equations(jaxpr) for var in eqn.outvars if var.aval.dtype == bool}
    assert (4, 4, 16) in masks  # of a block: B, T, S
    assert not [shape for shape in masks if len(shape) in (4, 6)]  # of all blocks, also broadcast to the query heads


def on_mesh(task, sizes, batch):
    """Compile loss and gradient with positions sharded over `sequence` and replicated parameters."""
    names = ("data", "expert", "fsdp", "sequence", "tensor")
    mesh = jax.make_mesh(tuple(sizes.get(name, 1) for name in names), names, axis_types=(AxisType.Auto,) * 5)
    replicated, by_batch = NamedSharding(mesh, P()), NamedSharding(mesh, P(("data", "fsdp", "expert")))
    step = quick_jit(
        functools.partial(value_and_grad, task), in_shardings=(replicated, by_batch), out_shardings=replicated
    )
    variables = jax.eval_shape(task.init, jax.random.key(0), spec_of(batch))
    with jax.set_mesh(mesh):
        return step.lower(variables, spec_of(batch)).compile()


@pytest.mark.parametrize("sizes", [{"data": 2, "sequence": 4}, {"data": 2, "sequence": 2, "tensor": 2}])
def test_sharded_positions_equal_one_device(sizes):
    """Faults: a device masks its queries as the first ones; gradients of keys are not summed; rotations, segments or
    targets are in another order than the tokens."""
    batch, variables = batch_of(), variables_of(SMALL)
    step = on_mesh(SMALL, sizes, batch)
    arguments = jax.device_put((variables, batch), step.input_shardings[0])
    assert_close(grad_of(SMALL, variables, batch), jax.device_get(step(*arguments)), 1e-5)


def test_the_zigzag_order():
    """Faults: it is not undone; a device has more work than another; the mask is in another order."""
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    slots = np.arange(24)
    with jax.set_mesh(mesh):
        order = layout.zigzag(jnp.asarray(slots)[None])
        np.testing.assert_array_equal(layout.natural(order)[0], slots)
        np.testing.assert_array_equal(layout.zigzag(jnp.asarray(slots)[None, :20])[0], slots[:20])
    np.testing.assert_array_equal(order[0], layout.zigzag_order(24, 4))
    assert set(np.asarray(order).reshape(4, 6).sum(axis=1)) == {69}


@pytest.mark.parametrize("pattern", [kernels.CAUSAL, kernels.Pattern(window=8)], ids=["causal", "window"])
def test_blocks_of_keys_that_see_nothing_are_skipped(pattern):
    """Fault: long rows cost twice what causal attention needs, and with a window many times that."""
    query, key, value, segments = random_input(64)
    first = 32 if pattern.window else 0
    value[:, first + 16 :] = np.nan  # a masked value that is read gives NaN
    value[:, : max(0, first - 16)] = np.nan
    mixed = quick_jit(functools.partial(attention.attention, pattern=pattern, block=4))(query, key, value, segments)
    assert np.isfinite(mixed[:, first : first + 4]).all()


@pytest.mark.slow
def test_memory_falls_with_the_devices_along_sequence():
    """Fault: every device along `sequence` keeps complete activations."""
    task = dataclasses.replace(SMALL, attention_block=2, remat="full")  # scores take the same memory on each mesh
    batch = batch_of([[1] * 1025] * 2)
    alone, four = (
        on_mesh(task, sizes, batch).memory_analysis().temp_size_in_bytes
        for sizes in ({"data": 2, "tensor": 4}, {"data": 2, "sequence": 4})
    )
    assert four < alone / 2.5


def test_rows_of_other_devices_are_not_gathered():
    """Fault: the gradients of keys and values are gathered for all rows, although a device has half of them."""
    task = dataclasses.replace(SMALL, attention_block=32, remat="full")
    text = on_mesh(task, {"data": 2, "sequence": 4}, batch_of([[1] * 129] * 2)).as_text()
    gathered = [each.bytes for each in collectives.find(text) if each.kind == "all-gather"]
    assert max(gathered) == 128 * task.kv_heads * task.head_dim * 4  # of one row


def test_positions_that_do_not_divide_are_refused():
    """Fault: the sequence axis is ignored without an error, and memory does not fall."""
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=r"mesh.sequence=8: must divide rows of 20 tokens; use rows of 16 or 24"),
    ):
        jax.eval_shape(SMALL.init, jax.random.key(0), spec_of(batch_of([[1] * 21])))
