"""One compiled train step of the toy task on a mesh, and comparisons of its states."""

import copy
import dataclasses
import math

import jax
import numpy as np
import optax
import toy
from emitters import SAME_BITS

from shampax.framework.data.pipeline import Batches
from shampax.framework.sharding import meshes, placement
from shampax.framework.sharding.global_batch import Share
from shampax.framework.step import state
from shampax.framework.step.steps import make_eval_step, make_train_step
from shampax.optimizers.baselines import AdamWOptions
from shampax.optimizers.plan import patterns

RULES = (("vocab", "tensor"), ("mlp", "tensor"), ("embed", "fsdp"))


SEED = 3


def initial_state(task, tx, spec, abstract, seed):
    """Compute the state before the first step."""
    names = patterns.paths(abstract)
    arrays = state.make_initial(task, tx, spec, abstract, seed, names)()
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in names])


class Bench:
    """A toy run, up to the first step."""

    def __init__(self, sizes, *, task=None, options=None, batch_size=16, rules=RULES, ema_decay=0.0, **step_options):
        sizes = {"data": 1, "fsdp": 1, "tensor": 1} | sizes
        self.mesh = meshes.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
        self.task = task or toy.ToyTask()
        self.share = Share(batch_size, self.mesh)
        self.batches = Batches(toy.ToySource(200, 1), seed=SEED, global_batch_size=batch_size, rows=self.share.rows)
        spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(self.batches[0]))
        variables = state.abstract_variables(self.task, spec)
        axes = self.task.logical_axes(variables)
        placements = placement.place_all(variables, axes, rules, self.mesh)
        rate = optax.linear_schedule(0.01, 0.001, 20)
        self.tx = (options or AdamWOptions()).build(rate, mesh=self.mesh, axis_names=axes["params"])
        self.abstract = state.abstract_state(variables, self.tx, placements, self.mesh, ema_decay)
        self.initial = lambda: initial_state(self.task, self.tx, spec, self.abstract, SEED)
        options = {"seed": SEED, "ema_decay": ema_decay} | step_options
        self.step = make_train_step(self.task, self.tx, rate, self.abstract, self.mesh, **options)
        self.eval_step = make_eval_step(self.task, self.abstract.variables, self.mesh)

    def batch(self, step):
        return self.share.to_devices(self.batches[step])

    def losses(self, steps):
        current, losses = self.initial(), []
        for step in range(steps):
            current, metrics = self.step(current, self.batch(step))
            losses.append(float(metrics["loss"]))
        return losses


def host(tree):
    return jax.tree.map(np.array, tree)


def assert_bitwise_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, host(first), host(second))


def assert_same_on_all_devices(tree):
    for leaf in jax.tree.leaves(tree):
        shards = {}
        for shard in leaf.addressable_shards:
            shards.setdefault(str(shard.index), []).append(np.array(shard.data))
        assert all((copy == copies[0]).all() for copies in shards.values() for copy in copies)


CLIP = 0.35  # some gradients of the toy are longer


NAN = (5, 6, 50)


def with_bits_of_users(bench):
    """Return the same with a step that can have the same bits as other programs."""
    exact = copy.copy(bench)
    exact.step = bench.step.lower(bench.abstract, bench.batch(0)).compile(SAME_BITS)
    return exact


def steps(bench, count, without=()):
    """Return the state after some steps, and the metrics of each; leave out the steps `without`."""
    current, metrics = bench.initial(), []
    for step in range(count):
        if step + 1 in without:
            current = dataclasses.replace(current, step=current.step + 1)
            continue
        current, measured = bench.step(current, bench.batch(step))
        metrics.append(measured)
    return current, {name: np.array([step[name] for step in metrics]) for name in metrics[0]}
