"""Make small train states, and save them in workdirs."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shampax.framework.checkpoint.record import Ranking, Record
from shampax.framework.checkpoint.saving import Checkpoints
from shampax.framework.sharding import meshes
from shampax.framework.step import guard
from shampax.framework.step.state import TrainState


def make_state(sizes, spec, *, width=8):
    """Return a state on its own mesh."""
    mesh = meshes.make_mesh({"data": 1, "fsdp": 1, "tensor": 1} | sizes)
    values = jnp.arange(16 * width, dtype=jnp.float32).reshape(16, width)
    params = {"layer": {"w": jax.device_put(values, NamedSharding(mesh, spec))}}
    scalars = [jax.device_put(jnp.int32(7 + i), meshes.replicated(mesh)) for i in range(4)]
    opt_state = jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec if leaf.ndim else P())),
        optax.adam(1e-3).init(params),
    )
    counts = jax.jit(guard.initial, out_shardings=meshes.replicated(mesh))()
    return TrainState(scalars[3], params, opt_state, {"counters": {"batches": scalars[0]}}, counts)


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def saver(workdir, **options):
    defaults = {"keep_last": 2, "keep_best": 1, "ranking": Ranking()}
    return Checkpoints(workdir, **(defaults | options))


def save(workdir, state, scores, **options):
    """Save a checkpoint at each step of `scores`, without an evaluation where the score is None."""
    record, checkpoints_of = Record(), saver(workdir, **options)
    for step, score in scores.items():
        record = dataclasses.replace(record, step=step, tokens=100 * step)
        if score is not None:
            record = record.with_evaluation({"loss": score}, Ranking())
        checkpoints_of.save(state, record, {"format": 1, "step": step})
    checkpoints_of.confirm()
    checkpoints_of.close()
    return record
