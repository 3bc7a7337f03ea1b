import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lm_cases import SMALL, assert_close, batch_of, grad_of, loss_of, lower_on_mesh, value_and_grad, variables_of
from traced import equations, quick_jit

from shampax.models.vocabulary import look_up, token_losses


@pytest.mark.parametrize(
    ("compute_dtype", "tolerance"), [("float32", 1e-5), pytest.param("bfloat16", 3e-2, marks=pytest.mark.slow)]
)
def test_a_loss_in_chunks_is_the_whole_loss(compute_dtype, tolerance):
    """Faults: a chunk reads another chunk's targets; masks, z-loss, accuracy or gradients differ."""
    whole = dataclasses.replace(SMALL, z_loss=0.01, layers=1, compute_dtype=compute_dtype)
    chunked = dataclasses.replace(whole, loss_chunks=4)
    variables, batch = variables_of(whole), batch_of()
    assert_close(loss_of(whole, variables, batch), loss_of(chunked, variables, batch), 1e-5)
    assert_close(grad_of(whole, variables, batch), grad_of(chunked, variables, batch), tolerance)


@pytest.mark.parametrize("chunks", [0, 3])
def test_losses_of_capped_logits(chunks):
    """Faults: the soft cap does not reach a chunk of the logits, or their mean."""
    random = np.random.default_rng(0)
    x, head = random.normal(size=(2, 5, 4)), 2 * random.normal(size=(8, 4))
    targets, real = random.integers(0, 8, (2, 5)), random.random((2, 5)) < 0.7
    logits = 1.5 * np.tanh(x @ head.T / 1.5)
    nats = np.log(np.exp(logits).sum(axis=-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    x, head = jnp.asarray(x, jnp.float32), jnp.asarray(head, jnp.float32)
    found = jax.jit(functools.partial(token_losses, chunks=chunks, soft_cap=1.5))(x, head, targets, real)
    z = np.log(np.exp(logits).sum(axis=-1))
    np.testing.assert_allclose(found.nats, nats[real].sum(), rtol=1e-5)
    np.testing.assert_allclose(found.z, (z[real] ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.uniform, (z - logits.mean(axis=-1))[real].sum(), rtol=1e-5)
    assert found.correct == (logits.argmax(axis=-1) == targets)[real].sum()


def test_no_array_of_a_loss_in_chunks_holds_all_logits():
    """Fault: the logits of all chunks are kept for the backward pass."""
    task = dataclasses.replace(SMALL, vocab_size=1024, loss_chunks=4)
    jaxpr = jax.make_jaxpr(functools.partial(value_and_grad, task))(variables_of(task), batch_of()).jaxpr
    assert max(var.aval.size for eqn in equations(jaxpr) for var in eqn.outvars) < 4 * 16 * 1024


def test_the_gradient_of_a_head_in_chunks_is_summed_over_devices_once():
    """Fault: the gradient of the whole head is summed in every turn of the loop."""
    task = dataclasses.replace(SMALL, tied_head=False, loss_chunks=4)
    step, _, _ = lower_on_mesh(task, (8, 1, 1), batch_of([[1] * 17] * 8))
    assert not re.search(r"f32\[64,32\][^=]* all-reduce\(.*while", step.as_text())
    in_loop = re.findall(r"= f32\[([\d,]+)\]\S* all-reduce\(.*transpose.*/while/body.*btv", step.as_text())
    assert in_loop == ["16,32"]


@pytest.mark.parametrize("loss_chunks", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_vocabulary_that_the_mesh_does_not_divide(loss_chunks):
    """Faults: tokens that do not exist get probability or win; the logits are not sharded."""
    whole = dataclasses.replace(SMALL, vocab_size=61, layers=1, tied_head=False)
    variables, batch = variables_of(whole), batch_of(vocab_size=61)
    task = dataclasses.replace(whole, loss_chunks=loss_chunks)
    step, shardings, by_batch = lower_on_mesh(task, (2, 1, 4), batch)
    if not loss_chunks:
        assert re.search(r"f32\[2,16,16\]\S* dot\(", step.as_text())
    sharded = step(jax.device_put(variables, shardings), jax.device_put(batch, by_batch))
    assert_close(grad_of(whole, variables, batch), jax.device_get(sharded), 1e-4)


@pytest.mark.slow
def test_a_mesh_that_shards_no_examples():
    """Fault: XLA refuses the gradient of a lookup with tensor parallelism alone."""
    task, batch = dataclasses.replace(SMALL, layers=1), batch_of()
    step, shardings, by_batch = lower_on_mesh(task, (1, 1, 2), batch)
    sharded = step(jax.device_put(variables_of(task), shardings), jax.device_put(batch, by_batch))
    assert_close(grad_of(task, variables_of(task), batch), jax.device_get(sharded), 1e-4)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 8, 1)], ids=str)
def test_gradients_of_frequent_tokens_are_summed_in_float32(sizes):
    """Faults: thousands of gradients of one token are summed in bfloat16, or not over all devices."""
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    table = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    tokens = np.zeros((8, 512), np.int32)
    tokens[:, ::128] = 3
    with jax.set_mesh(mesh):
        step = quick_jit(
            jax.value_and_grad(lambda table, tokens: (look_up(table, tokens, jnp.bfloat16) * 1.0).sum()),
            in_shardings=(NamedSharding(mesh, P("tensor", "fsdp")), NamedSharding(mesh, P(("data", "fsdp")))),
        )
        _, gradient = step(table, tokens)
    np.testing.assert_array_equal(gradient, np.array([4064.0, 0, 0, 32])[:, None] * np.ones((1, 16)))
