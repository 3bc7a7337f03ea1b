"""The step of Distributed Shampoo: from gradients to directions, with new moments, statistics and roots.

For a block G (r x c) under Shampoo (Anil, Gupta, Koren, Regan and Singer, "Scalable Second Order Optimization for Deep
Learning", arXiv 2002.09018); the package `preconditioners` has the variants:

    M <- beta1 M + (1 - beta1) G                               momentum
    U = L^(-1/p) M R^(-1/p)                                    with the roots of an earlier step
    U <- the nearest semi-orthogonal matrix, roughly           if `orthogonalize`
    U, scaled to the graft's norm                              the direction
    L <- beta2 L + (1 - beta2) G G',  R the same with G' G     statistics
    for the blocks that are due: new roots of L and R, used from the next step on
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import diagonal
from .diagonal import Moments
from .exchange import Owners
from .linalg.polynomials import orthogonalized
from .linalg.roots import inner
from .linalg.scaling import all_finite, exponent_of, largest, power_of, power_of_two
from .plan.blocks import Bucket
from .plan.patterns import state_key
from .preconditioners.base import Blocks, PreconditionerState
from .refresh import refresh
from .state import BucketState, Layout, ShampooState


class _Tables(NamedTuple):
    """Static tables of a bucket, sharded over the owners; axis 0 is the slots or the devices."""

    routes: Any
    matrix: jax.Array
    sizes: jax.Array
    due: jax.Array


class _Proposal(NamedTuple):
    """The result of a step on the blocks of a bucket, before it is accepted.

    Attributes:
      moments, second_moment: new moments of the graft, and second moment of the preconditioner.
      direction: [n, *shape] preconditioned direction, divided by 2^unit.
      unit: int32 or float32, binary scale of the direction.
      graft: [n, *shape] direction of the graft method, divided by 2^graft_unit.
      acts: [n] bool, whether a block uses its preconditioner instead of the graft method.
    """

    moments: Moments
    second_moment: jax.Array | None
    direction: jax.Array
    unit: jax.Array | int | float
    graft: jax.Array
    acts: jax.Array


def precondition(gradients: Sequence[jax.Array], state: ShampooState) -> tuple[list[jax.Array], ShampooState]:
    """Return the direction of each parameter, float32, and the next state.

    If a gradient, its square or a direction is not finite, the step is skipped: directions are zero, and only the
    counter `skipped` changes.

    Args:
      gradients: gradient of each parameter of the layout.
      state: state after the previous step.
    """
    layout = state.layout
    plan, owners, rule = layout.plan, layout.owners, layout.options.of_diagonal
    directions: list[jax.Array] = [jnp.zeros(())] * len(gradients)
    moments, sizes = {}, []
    for i, leaf in plan.diagonal.items():
        key, g = state_key(leaf.path), gradients[i].astype(jnp.float32)
        if leaf.by_row:
            moments[key], directions[i] = diagonal.advance_rows(state.diagonal[key], g, rule.epsilon)
        else:
            h = _unit(g) if rule.normalizes else g
            moments[key], _, directions[i] = diagonal.advance(state.diagonal[key], h, leaf.beta2, rule)
        # A square may overflow although the gradient and the direction do not, and would stay in the state.
        sizes.append(jnp.maximum(g * g, jnp.abs(directions[i])))

    tiles, buckets, accepted = owners.run(
        lambda tiles, owned, shared: _on_owners(layout, tiles, *owned, *shared),
        {b.name: [owners.cut(gradients[leaf.index], leaf) for leaf in b.leaves] for b in plan.buckets},
        {b.name: owners.specs(b) for b in plan.buckets},
        (
            state.buckets,
            {b.name: _tables(b, owners) for b in plan.buckets},
        ),
        (state.count + 1, all_finite(sizes)),
    )
    for bucket in plan.buckets:
        for leaf, x in zip(bucket.leaves, tiles[bucket.name], strict=True):
            directions[leaf.index] = owners.join(x, leaf)
    return [jnp.where(accepted, direction, 0) for direction in directions], dataclasses.replace(
        state,
        count=state.count + accepted.astype(jnp.int32),
        skipped=state.skipped + (~accepted).astype(jnp.int32),
        buckets=buckets,
        diagonal=_select(accepted, moments, state.diagonal),
    )


def _tables(bucket: Bucket, owners: Owners) -> _Tables:
    static = bucket.matrix_of_slot, bucket.real_sizes, bucket.due
    return _Tables(owners.tables(bucket), *map(jnp.asarray, static))


def _on_owners(
    layout: Layout,
    tiles: dict[str, list[jax.Array]],
    states: dict[str, BucketState],
    tables: dict[str, _Tables],
    step: jax.Array,
    finite: jax.Array,
) -> tuple[dict[str, list[jax.Array]], dict[str, BucketState], jax.Array]:
    """Return tiles of the directions, new states and whether the step is accepted, for the blocks of one device.

    `step` counts from 1; `finite` is whether the gradients of diagonal parameters are finite.
    """
    buckets, owners, options = layout.plan.buckets, layout.owners, layout.options
    matrices = {name: table.matrix for name, table in tables.items()}
    gradients = {b.name: owners.to_owners(tiles[b.name], tables[b.name].routes, b) for b in buckets}
    length = owners.max(largest(gradients))
    # A square may overflow although the gradient does not.
    finite &= jnp.isfinite(length * length)
    # Squares of directions are taken in units of the largest entry, so that they stay within float32.
    scale_log2 = exponent_of(jnp.where(finite, length, 0))
    # LAPACK may hang on a NaN, even in a step that is skipped.
    gradients = {name: jnp.where(finite, g, 0) for name, g in gradients.items()}
    observed = gradients
    if options.of_graft.normalizes:
        observed = {name: g * power_of_two(-scale_log2) for name, g in gradients.items()}
        lengths = {name: inner(g, g)[:, None] for name, g in observed.items()}
        norms = _over_matrices(lengths, matrices, buckets, owners)
        observed = {name: g * _column(_reciprocal(jnp.sqrt(norms[name][:, 0])), g) for name, g in observed.items()}

    blocks = {b.name: Blocks(b, tables[b.name].sizes, options) for b in buckets}
    graft_unit = scale_log2 if options.of_graft.method.follows_scale else 0
    proposals = {
        name: _propose(states[name], observed[name], blocks[name], step, scale_log2, graft_unit) for name in gradients
    }
    grafted = [b for b in buckets if b.preconditioner.grafts and options.graft != "none"]
    squares = {}
    for bucket in grafted:
        x = proposals[bucket.name]
        both = jnp.stack([inner(x.direction, x.direction), inner(x.graft, x.graft)], axis=1)
        squares[bucket.name] = jnp.where(x.acts[:, None], both, 0)
    ratios = _graft_ratios(squares, matrices, grafted, owners)

    directions, graft_ratios, overflows = {}, {}, jnp.zeros((), jnp.int32)
    for name, x in proposals.items():
        factor = ratios[name] * power_of_two(graft_unit) if name in ratios else power_of_two(x.unit)
        graft_ratios[name] = jnp.where(x.acts, factor * power_of_two(-x.unit), 0)
        acts, factor = _column(x.acts, x.direction), _column(jnp.broadcast_to(factor, x.acts.shape), x.direction)
        directions[name] = jnp.where(acts, x.direction * factor, x.graft * power_of_two(graft_unit))
        overflows += (~all_finite((directions[name], x.second_moment))).astype(jnp.int32)
    accepted = finite & (owners.sum(overflows) == 0)

    roots = {
        name: _observe(states[name].roots, gradients[name], x.second_moment, blocks[name], accepted)
        for name, x in proposals.items()
    }
    roots = refresh(roots, {name: table.due for name, table in tables.items()}, blocks, step, accepted)
    new_states = {
        name: states[name]._replace(
            moments=_select(accepted, x.moments, states[name].moments),
            roots=roots[name],
            graft_ratio=jnp.where(accepted, graft_ratios[name], states[name].graft_ratio),
        )
        for name, x in proposals.items()
    }
    return (
        {b.name: owners.from_owners(directions[b.name], tables[b.name].routes, b) for b in buckets},
        new_states,
        accepted,
    )


def _propose(
    state: BucketState,
    g: jax.Array,
    blocks: Blocks,
    step: jax.Array,
    scale_log2: jax.Array,
    graft_unit: jax.Array | int,
) -> _Proposal:
    """Advance the moments and compute the direction of the blocks of a bucket.

    `g` [n, *shape] are the gradients, normalised for a "_normalized" graft, with the binary scale `scale_log2` of the
    largest entry; `graft_unit` is that of the graft's direction.
    """
    bucket, _, options = blocks
    preconditioner = bucket.preconditioner
    steps = 0 if preconditioner.orthogonal else bucket.orthogonalize
    moments, momentum, graft = diagonal.advance(state.moments, g, bucket.beta2, options.of_graft)
    if not preconditioner.grafts:
        direction, second_moment = preconditioner.act(momentum, g, state.roots, moments.age, blocks)
        if steps:
            orthogonal = orthogonalized(direction, steps, bucket.precision.action)
            ratio = jnp.sqrt(inner(direction, direction)) * _reciprocal(jnp.sqrt(inner(orthogonal, orthogonal)))
            direction = orthogonal * _column(ratio, orthogonal)
        return _Proposal(moments, second_moment, direction, 0, graft, jnp.ones_like(state.roots.refreshed, bool))
    unit = 0 if options.of_graft.normalizes else scale_log2
    direction, second_moment = preconditioner.act(momentum * power_of_two(-unit), g, state.roots, moments.age, blocks)
    if steps:  # the result has no unit
        direction, unit = orthogonalized(direction, steps, bucket.precision.action), 0
    else:
        degree = preconditioner.degree(bucket)
        # From the units of the roots to those of this step, which all blocks share.
        change = power_of(degree, scale_log2 - state.roots.roots_scale_log2)
        direction *= _column(power_of_two(change), direction)
        unit = unit - power_of(degree, scale_log2)
    acts = jnp.broadcast_to(step >= options.start_step, moments.age.shape)
    if bucket.sides:
        acts &= (state.roots.refreshed > 0) & (state.roots.failures < options.max_failures)
    return _Proposal(moments, second_moment, direction, unit, graft * power_of_two(-graft_unit), acts)


def _over_matrices(
    values: dict[str, jax.Array], matrix_of_slot: dict[str, jax.Array], buckets: Sequence[Bucket], owners: Owners
) -> dict[str, jax.Array]:
    """Return sums of values [slots, k] over the blocks of each matrix, [slots, k], by one all-reduce."""
    if not buckets:
        return {}
    sums = [jax.ops.segment_sum(values[b.name], matrix_of_slot[b.name], b.matrices) for b in buckets]
    joined, result, first = owners.sum(jnp.concatenate(sums)), {}, 0
    for bucket in buckets:
        result[bucket.name] = joined[first : first + bucket.matrices][matrix_of_slot[bucket.name]]
        first += bucket.matrices
    return result


def _graft_ratios(
    squares: dict[str, jax.Array],
    matrix_of_slot: dict[str, jax.Array],
    buckets: Sequence[Bucket],
    owners: Owners,
) -> dict[str, jax.Array]:
    """Return the ratio of the graft's norm to that of the preconditioned direction, [slots], over each matrix.

    Norms are taken over the blocks with roots: a block without roots has the graft's own direction.

    Args:
      squares: bucket name -> [slots, 2], sums of squares of the preconditioned direction and of the graft's; 0 for
        blocks without roots.
      matrix_of_slot: bucket name -> [slots], matrix of each block.
      buckets: buckets whose directions are grafted.
      owners: owners of the slots.
    """
    sums = _over_matrices(squares, matrix_of_slot, buckets, owners)
    return {
        name: jnp.where(x[:, 0] > 0, jnp.sqrt(x[:, 1] / jnp.where(x[:, 0] > 0, x[:, 0], 1)), 0)
        for name, x in sums.items()
    }


def _observe(
    old: PreconditionerState, g: jax.Array, second_moment: jax.Array | None, blocks: Blocks, accepted: jax.Array
) -> PreconditionerState:
    """Return the state with the statistics of this step, if it is accepted."""
    new = blocks.bucket.preconditioner.accumulate(old, g, blocks)
    return old._replace(
        statistics=_select(accepted, new.statistics, old.statistics),
        scale_log2=jnp.where(accepted, new.scale_log2, old.scale_log2),
        age=old.age + accepted.astype(jnp.int32),
        second_moment=_select(accepted, second_moment, old.second_moment),
    )


def _select(accepted: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, old)


def _column(x: jax.Array, like: jax.Array) -> jax.Array:
    """Return [n] with axes of length 1 up to the rank of `like`."""
    return x.reshape(-1, *[1] * (like.ndim - 1))


def _unit(x: jax.Array) -> jax.Array:
    """Return x / |x|; the squares are taken in units of the largest entry."""
    x = x * power_of_two(-exponent_of(largest(x)))
    return x * _reciprocal(jnp.sqrt(jnp.sum(x * x)))


def _reciprocal(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)
