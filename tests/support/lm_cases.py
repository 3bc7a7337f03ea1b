"""A small language model with jitted functions, and rows of packed documents for it."""

import functools

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from traced import quick_jit

from shampax.framework.sharding import placement
from shampax.models.lm import LMTask

SMALL = LMTask(vocab_size=64, layers=2, embed_dim=32, heads=4, kv_heads=2, head_dim=8, mlp_dim=48)
# Multi-head latent attention in which all widths differ, with the scaled rotation of DeepSeek-V3.
LATENTS = {
    "kv_heads": 4,
    "latent_dim": 10,
    "query_latent_dim": 12,
    "rope_dim": 4,
    "value_dim": 6,
    "rope_scaling": "yarn factor=4 original=8 mscale=1 mscale_all_dim=0.5",
}
SEGMENTS = [[1] * 4 + [2] * 7 + [3] * 5 + [0], [1] * 17, [1] * 9 + [0] * 8, [1] + [2] * 16]


def batch_of(segments=SEGMENTS, vocab_size=64, seed=0):
    """Return random tokens for the given segments, with positions that restart in each."""
    segments = np.array(segments, np.int32)
    rows, length = segments.shape
    starts = np.diff(segments, prepend=-1, axis=1) != 0
    slots = np.tile(np.arange(length), (rows, 1))
    random = np.random.default_rng(seed)
    return {
        "tokens": random.integers(0, vocab_size, segments.shape, np.int32),
        "segments": segments,
        "positions": (slots - np.maximum.accumulate(np.where(starts, slots, 0), axis=1)).astype(np.int32),
        "bytes": random.integers(0, 50, rows, np.int32),
    }


def spec_of(batch):
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}


@functools.cache
def variables_of(task):
    """Return parameters drawn by NumPy, with norms and embeddings large enough that everything matters."""
    random = np.random.default_rng(1)
    abstract = jax.eval_shape(task.init, jax.random.key(0), spec_of(batch_of()))
    return jax.tree.map(lambda x: random.normal(0.1, 0.25, x.shape).astype(np.float32), abstract)


@functools.partial(quick_jit, static_argnums=0)
def logits_of(task, variables, batch):
    return task.logits(variables, batch)[0]


@functools.partial(quick_jit, static_argnums=(0, 3))
def loss_of(task, variables, batch, train=True):
    return task.loss(variables, batch, key=jax.random.key(0), train=train)


def but_real_tokens(result):
    """Return the result of `loss_of` without the one metric that padding changes."""
    loss, (state, metrics) = result
    return loss, (state, {name: value for name, value in metrics.items() if name != "real_tokens"})


def value_and_grad(task, variables, batch):
    return jax.value_and_grad(lambda v: task.loss(v, batch, key=jax.random.key(0), train=True)[0])(variables)


grad_of = quick_jit(value_and_grad, static_argnums=0)


def assert_close(left, right, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), left, right)


SPECS = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor", "kv_heads": "tensor", "vocab": "tensor"}


def lower_on_mesh(task, sizes, batch):
    """Compile loss and gradient with parameters sharded by the usual rules and the batch over data and fsdp."""
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    variables = jax.eval_shape(task.init, jax.random.key(0), spec_of(batch))
    rules = [*SPECS.items(), *((name, None) for name in ("kv", "layers", "norm"))]
    placements = placement.place_all(variables, task.logical_axes(variables), rules, mesh)
    shardings = placement.shardings(variables, placements, mesh)
    by_batch = NamedSharding(mesh, P(("data", "fsdp")))
    step = quick_jit(
        functools.partial(value_and_grad, task),
        in_shardings=(shardings, by_batch),
        out_shardings=(NamedSharding(mesh, P()), shardings),
    )
    with jax.set_mesh(mesh):
        return step.lower(variables, spec_of(batch)).compile(), shardings, by_batch
