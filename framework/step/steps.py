"""The train, evaluation and prediction steps: pure jitted functions with explicit shardings."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...optimizers.linalg.scaling import all_finite, largest
from .. import optimizer
from ..sharding import meshes
from ..task import Batch, Judge, Metrics, Task, settled, sparse_of
from . import averaging, guard
from .rows import on_used_rows
from .scalars import Scalars
from .state import TrainState, shardings


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    abstract: TrainState,
    mesh: Mesh,
    *,
    seed: int,
    microbatches: int = 1,
    gradient_clip: float = 0.0,
    ema_decay: float = 0.0,
) -> jax.stages.Wrapped:
    """Return the jitted train step `(state, batch) -> (state, metrics)`, which donates the state.

    Gradients of micro-batches are weighted by the weights of their losses, for example the number of targets. The sum
    is the gradient of the whole batch, however uneven the masks are. If the guard refuses the step, parameters,
    optimizer state, model state and averages stay bitwise unchanged; `step` still advances. The guard refuses a
    non-finite loss, gradient or update, and an update that the optimizer refuses.

    Args:
      task: the model.
      tx: the optimizer, which applies the learning rate.
      learning_rate: the schedule given to `tx`, for reporting; a function of the number of accepted steps.
      abstract: shapes and shardings of the state.
      mesh: the mesh.
      seed: of the random keys; micro-batch i of step t has fold_in(fold_in(key(seed), t), i), and fold_in(..., r)
        between these two if each replica r of the parameters has micro-batches of its own.
      microbatches: number of micro-batches; divides each device's share of the batch.
      gradient_clip: bound on the global norm of the gradient; 0 disables.
      ema_decay: decay of the average of the parameters; 0 keeps none. The loss is that of the trained parameters.

    Metrics are float32 scalars (counts int32) in one array, replicated: those of the task (total / weight),
    `gradient_norm` (before clipping), `update_norm`, `learning_rate` and the guard's `skipped`, `consecutive_skips`,
    `clipped`.

    Raises:
      ValueError: the optimizer or an average changes all rows of a table of which the task updates some.
    """
    params_shardings, with_tables = shardings(abstract.params), sparse_of(task)
    for path in with_tables.sparse if with_tables else ():
        optimizer.refuse_dense(tx, abstract.params, path)
    if with_tables and ema_decay:
        raise ValueError(
            f"config.ema_decay={ema_decay}: an average changes all rows of {with_tables.sparse[0]!r} in a step, and "
            "the task updates only some. Use 0, or switch off the task's sparse updates."
        )

    def train_step(state: TrainState, batch: Batch, usable: jax.Array | bool = True) -> tuple[TrainState, Scalars]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        before = dict(state.trained)
        params = before.pop("params")
        gradients, model_state, sums = _whole_batch_gradients(
            task, params, state.fixed, before, _cut(batch, microbatches, mesh), key, params_shardings
        )
        model_state = settled(task, model_state)
        metrics = {name: total / weight for name, (total, weight) in sums.items()}
        metrics["learning_rate"] = jnp.asarray(learning_rate(state.step - state.guard.skipped), jnp.float32)
        metrics["gradient_norm"] = global_norm(gradients)

        # Loss and finiteness are reductions over global arrays, so that all devices decide alike.
        accepted = all_finite(gradients) & jnp.isfinite(metrics["loss"]) & usable
        if gradient_clip:
            scale = gradient_clip / jnp.maximum(metrics["gradient_norm"], gradient_clip)
            gradients = jax.tree.map(lambda leaf: leaf * scale, gradients)
        # A solver inside the optimizer must never see a NaN, not even in a step that is thrown away: LAPACK may not
        # return from one.
        gradients = jax.tree.map(lambda leaf: jnp.where(accepted, leaf, 0), gradients)
        updates, opt_state = tx.update(gradients, state.opt_state, params)
        update_norm = optax.tree.norm(updates)
        accepted &= guard.applied(update_norm, (opt_state, model_state), (state.opt_state, before))
        metrics["update_norm"] = jnp.where(accepted, update_norm, 0.0)

        def guarded(new: Any, old: Any) -> Any:
            return jax.tree.map(functools.partial(jnp.where, accepted), new, old)

        iterate = {"params": optax.apply_updates(params, updates), **model_state}
        new, averages = averaging.advance(state.changing, state.averaging, iterate, ema_decay)
        clipped = (metrics["gradient_norm"] > gradient_clip) if gradient_clip else False
        state = TrainState(
            step=state.step + 1,
            params=guarded(new.pop("params"), state.params),
            opt_state=guarded(opt_state, state.opt_state),
            model_state=guarded(new, state.model_state),
            guard=guard.updated(state.guard, accepted, clipped),
            averaging=guarded(averages, state.averaging),
            frozen=state.frozen,
        )
        metrics |= {
            "skipped": state.guard.skipped,
            "consecutive_skips": state.guard.consecutive,
            "clipped": state.guard.clipped,
        }
        return state, Scalars.pack(metrics)

    return jax.jit(
        on_used_rows(train_step, with_tables, abstract) if with_tables else train_step,
        in_shardings=(shardings(abstract), meshes.batch_sharding(mesh)),
        out_shardings=(shardings(abstract), meshes.replicated(mesh)),
        donate_argnums=0,
    )


def make_diagnosis(abstract: TrainState, mesh: Mesh) -> jax.stages.Wrapped:
    """Return the jitted `opt_state -> ({"optimizer/<diagnostic>": scalar}, arrays about its blocks)`.

    Only reported steps run it.
    """

    def diagnose(opt_state: Any) -> tuple[Scalars, Any]:
        values = optimizer.diagnostics(opt_state)
        scalars = Scalars.pack({f"optimizer/{name}": value for name, value in values.items()})
        return scalars, optimizer.by_block(opt_state)

    return jax.jit(diagnose, in_shardings=(shardings(abstract.opt_state),), out_shardings=meshes.replicated(mesh))


def make_eval_step(task: Task, variables: Any, mesh: Mesh, microbatches: int = 1) -> jax.stages.Wrapped:
    """Return the jitted `(variables, batch) -> metrics` of one held-out batch, sums of (total, weight) pairs.

    It uses the micro-batches of training, so that it needs no more memory. `variables` are arrays, or have shapes and
    shardings only.
    """

    def eval_step(variables: dict[str, Any], batch: Batch) -> Metrics:
        def of_microbatch(part: Batch) -> Metrics:
            _, (_, metrics) = task.loss(variables, part, key=jax.random.key(0), train=False)
            return metrics

        if microbatches == 1:
            return of_microbatch(batch)
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), jax.lax.map(of_microbatch, _cut(batch, microbatches, mesh)))

    return jax.jit(
        eval_step,
        in_shardings=(shardings(variables), meshes.batch_sharding(mesh)),
        out_shardings=meshes.replicated(mesh),
    )


def make_predict_step(judge: Judge, variables: Any, mesh: Mesh, microbatches: int = 1) -> jax.stages.Wrapped:
    """Return the jitted `(variables, batch) -> predictions` of one held-out batch, replicated on every process."""

    def predict_step(variables: dict[str, Any], batch: Batch) -> dict[str, jax.Array]:
        if microbatches == 1:
            return judge.predict(variables, batch)
        parts = jax.lax.map(functools.partial(judge.predict, variables), _cut(batch, microbatches, mesh))
        # Micro-batch i has the examples i, i + microbatches, ...
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), parts)

    return jax.jit(
        predict_step,
        in_shardings=(shardings(variables), meshes.batch_sharding(mesh)),
        out_shardings=meshes.replicated(mesh),
    )


def global_norm(tree: Any) -> jax.Array:
    """Return the root of the sum of all squares, float32. Squares are scaled so that they do not overflow."""
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    unit = largest(leaves)
    unit = jnp.where(unit > 0, unit, 1.0)
    return unit * jnp.sqrt(sum(jnp.sum(jnp.square(leaf / unit)) for leaf in leaves))


def _cut(batch: Batch, microbatches: int, mesh: Mesh) -> Batch:
    """Reshape [batch, ...] to [microbatches, batch / microbatches, ...].

    Micro-batch i has the examples i, i + microbatches, ...: every device cuts its own examples, and none moves.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, meshes.batch_axes(mesh)))

    def cut(leaf: jax.Array) -> jax.Array:
        rows = leaf.reshape(leaf.shape[0] // microbatches, microbatches, *leaf.shape[1:])
        return jax.lax.with_sharding_constraint(jnp.swapaxes(rows, 0, 1), sharding)

    return jax.tree.map(cut, dict(batch))


def _whole_batch_gradients(
    task: Task,
    params: Any,
    fixed: dict[str, Any],
    first: dict[str, Any],
    microbatches: Batch,
    key: jax.Array,
    layout: Any,
) -> tuple[Any, dict[str, Any], Metrics]:
    """Return the gradient of sum(totals) / sum(weights) over the micro-batches, the last model state, metric sums.

    If every device has all parameters, each adds up micro-batches of its own rows, and gradients cross the network once
    per step. With model state, a micro-batch has the rows of all devices: its moments may be those of a batch.

    With sharded parameters, gradients are summed over the devices in every turn, because only the sum is small: a
    device keeps its share of it. Sums over replicas could still wait for the last turn, but inside a `shard_map` over
    replicas XLA divides products with gathered weights into many small ones or, if told not to, sums whole gradients
    where it otherwise scatters them. By the compiled programs, `lm.py:1b` with two micro-batches on 16 x 16 chips would
    take 481 or 308 ms instead of 297.
    """
    mesh = jax.tree.leaves(layout)[0].mesh
    specs = jax.tree.map(lambda sharding: sharding.spec, layout)
    replicas = tuple(axis for axis, size in mesh.shape.items() if size > 1)
    several = len(jax.tree.leaves(microbatches)[0]) > 1
    if first or not several or {*replicas} - {*meshes.REPLICA_AXES} or any(map(any, jax.tree.leaves(specs))):
        replicas = ()

    def on_replica(params: Any, fixed: Any, microbatches: Batch, key: jax.Array) -> tuple[Any, Metrics]:
        key = jax.random.fold_in(key, jax.lax.axis_index(replicas))
        gradients, _, sums = _summed_gradients(task, params, fixed, first, microbatches, key, specs)
        return jax.lax.psum((gradients, sums), replicas)

    if replicas:
        gradients, sums = jax.shard_map(
            on_replica,
            mesh=mesh,
            axis_names={*replicas},
            in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(None, replicas), PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(params, fixed, microbatches, key)
        model_state = first
    else:
        gradients, model_state, sums = _summed_gradients(task, params, fixed, first, microbatches, key, layout)
    weight = sums["loss"][1]
    return jax.tree.map(lambda leaf: leaf / weight, gradients), model_state, sums


def _summed_gradients(
    task: Task,
    params: Any,
    fixed: dict[str, Any],
    first: dict[str, Any],
    microbatches: Batch,
    key: jax.Array,
    layout: Any,
) -> tuple[Any, dict[str, Any], Metrics]:
    """Return the sums of weight x gradient over the micro-batches, the last model state, metric sums.

    `layout` has the shardings of the parameters, or their specs in a `shard_map`.
    """

    def loss(params, model_state, batch, key):
        return task.loss({"params": params, **fixed, **model_state}, batch, key=key, train=True)

    def lay_out(gradients):
        return jax.tree.map(jax.lax.with_sharding_constraint, gradients, layout)

    def accumulate(carry, numbered_batch):
        gradients, model_state = carry
        number, batch = numbered_batch
        (_, (model_state, metrics)), new = jax.value_and_grad(loss, has_aux=True)(
            params, model_state, batch, jax.random.fold_in(key, number)
        )
        weight = metrics["loss"][1]
        # The loss of a micro-batch without targets may be 0 / 0.
        gradients = jax.tree.map(lambda total, leaf: total + jnp.where(weight > 0, weight * leaf, 0), gradients, new)
        return (lay_out(gradients), model_state), metrics

    count = jax.tree.leaves(microbatches)[0].shape[0]
    start = lay_out(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params))
    inputs = (jnp.arange(count), microbatches)
    if count == 1:
        # XLA keeps a loop of one iteration, and on a CPU convolutions in a loop take ten times as long.
        (gradients, model_state), sums = accumulate((start, first), jax.tree.map(lambda x: x[0], inputs))
    else:
        (gradients, model_state), stacked = jax.lax.scan(accumulate, (start, first), inputs)
        sums = jax.tree.map(lambda leaf: leaf.sum(axis=0), stacked)
    return gradients, model_state, sums
