"""Statistics of gradients, and fresh factors of them for the blocks that are due, accepted only if sound."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import residence, storage
from .blocks import Bucket
from .moments import correction
from .options import ShampooOptions
from .preconditioners import PRECONDITIONERS, Preconditioner
from .preconditioners.base import Blocks, Solved
from .symmetric import pack, packed_shape, unpack

NO_GRADIENT = -1000


class Roots(NamedTuple):
    """What a refresh reads and writes for the blocks of one bucket; axis 0 of every array numbers the slots.

    Attributes:
      statistics: per preconditioned side [n, r, r], packed (see the module `symmetric`), of gradients divided by
        2^exponent.
      exponent: [n] int32, of the largest gradient entry so far: squares of gradients would leave float32 far sooner
        than gradients do. NO_GRADIENT before the first that is not zero.
      roots: per preconditioned side [n, r, r], packed where they are symmetric: what acts on it, an inverse root or
        what else the preconditioner makes of its statistics; zero before the first accepted refresh.
      second_moment: [n, *shape] float32, of the gradients as a preconditioner sees them that adapts; None otherwise.
      residual: [n] float32 of the newest accepted roots, the worst side.
      condition: [n] float32, estimate of the condition number of the regularised statistics, the worst side.
      effective_rank: [n] float32, trace / largest eigenvalue of the statistics, the side where it is least.
      refreshed: [n] int32, the step count after which the roots were accepted; 0 before the first.
      failures: [n] int32, refused refreshes in a row.
      refreshes: [n] int32, accepted refreshes in all.
      spared: per preconditioned side [n] int32, in how many of these its factor stayed, being still suited.
    """

    statistics: tuple[jax.Array, ...]
    exponent: jax.Array
    roots: tuple[jax.Array, ...]
    second_moment: jax.Array | None
    residual: jax.Array
    condition: jax.Array
    effective_rank: jax.Array
    refreshed: jax.Array
    failures: jax.Array
    refreshes: jax.Array
    spared: tuple[jax.Array, ...]


class Fresh(NamedTuple):
    """What a refresh has found for blocks of one bucket; axis 0 of every array numbers the blocks that were due.

    Attributes:
      roots: per preconditioned side [m, ...] float32, as they are kept, of the gradients as they are.
      residual, condition: [m] float32, of the worst side.
      effective_rank: [m] float32, of the side where it is least.
      accepted: [m] bool, whether the roots of all sides may be used.
      seen: [m] bool, whether the block has seen a gradient that is not zero: otherwise it has nothing to fail at.
      suited: [m] int32, bit k tells that the factor of the k-th preconditioned side stays as it is.
    """

    roots: tuple[jax.Array, ...]
    residual: jax.Array
    condition: jax.Array
    effective_rank: jax.Array
    accepted: jax.Array
    seen: jax.Array
    suited: jax.Array


class Due(NamedTuple):
    """The blocks of one bucket that a device refreshes on this step.

    Attributes:
      slot: [window] int32, the device's slots; one past the last where nothing is due.
      sizes: [window, sides of a block] int32, the blocks' real lengths.
    """

    slot: jax.Array
    sizes: jax.Array


def initial_roots(bucket: Bucket, slots: int, options: ShampooOptions) -> Roots:
    """Before the first gradient."""
    lengths = [bucket.shape[side] for side in bucket.sides]
    return Roots(
        statistics=_nothing(slots, [packed_shape(r) for r in lengths], options.statistics_dtype),
        exponent=jnp.full(slots, NO_GRADIENT, jnp.int32),
        roots=_nothing(slots, [factor_shape(bucket, r) for r in lengths], options.roots_dtype),
        second_moment=jnp.zeros((slots, *bucket.shape), jnp.float32) if preconditioner_of(bucket).adapts else None,
        residual=jnp.zeros(slots, jnp.float32),
        condition=jnp.zeros(slots, jnp.float32),
        effective_rank=jnp.zeros(slots, jnp.float32),
        refreshed=jnp.zeros(slots, jnp.int32),
        failures=jnp.zeros(slots, jnp.int32),
        refreshes=jnp.zeros(slots, jnp.int32),
        spared=tuple(jnp.zeros(slots, jnp.int32) for _ in lengths),
    )


def _nothing(slots: int, shapes: Sequence[tuple[int, int]], dtype: str) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros((slots, *storage.shape_of(shape, dtype)), dtype) for shape in shapes)


def preconditioner_of(bucket: Bucket) -> Preconditioner:
    """The member of the family that a bucket's blocks are under."""
    return PRECONDITIONERS[bucket.group.preconditioner]


def factor_shape(bucket: Bucket, r: int) -> tuple[int, int]:
    """Of what is kept for a side of length r to act on it."""
    return packed_shape(r) if preconditioner_of(bucket).symmetric else (r, r)


def kept_factor(x: Any, bucket: Bucket) -> Any:
    """A factor [..., r, r] as it is kept; NumPy or JAX."""
    return pack(x) if preconditioner_of(bucket).symmetric else x


def _factors(kept: Sequence[jax.Array], bucket: Bucket) -> list[jax.Array]:
    """Per preconditioned side [n, r, r] float32, of arrays [n, ...] as they are kept."""
    lengths = [bucket.shape[side] for side in bucket.sides]
    whole = [storage.loaded(x, factor_shape(bucket, r)) for r, x in zip(lengths, kept, strict=True)]
    if not preconditioner_of(bucket).symmetric:
        return whole
    return [unpack(x, r) for r, x in zip(lengths, whole, strict=True)]


def statistics_of(kept: jax.Array, bucket: Bucket, number: int) -> jax.Array:
    """[n, r, r] float32 of one preconditioned side, from [n, ...] as they are kept."""
    r = bucket.shape[bucket.sides[number]]
    return unpack(storage.loaded(kept, packed_shape(r)), r)


def grafted(bucket: Bucket, options: ShampooOptions) -> bool:
    """Whether the update of a bucket's blocks has the length of the graft's."""
    return options.graft != "none" and preconditioner_of(bucket).grafts


def blocks_of(roots: Roots, bucket: Bucket, sizes: jax.Array) -> Blocks:
    """A device's blocks as a preconditioner sees them; `sizes` are [n, sides of a block] their real lengths."""
    return Blocks(
        sides=bucket.sides,
        factors=_factors(roots.roots, bucket),
        found=roots.refreshed > 0,
        exponent=roots.exponent,
        statistics=lambda: [statistics_of(kept, bucket, number) for number, kept in enumerate(roots.statistics)],
        second_moment=roots.second_moment,
        sizes=sizes,
        group=bucket.group,
    )


def usable(roots: Roots, bucket: Bucket, options: ShampooOptions, step: jax.Array) -> jax.Array:
    """[n] whether a block acts by its preconditioner on a step, rather than by the graft method."""
    always = jnp.ones_like(roots.refreshed, dtype=bool)
    if not preconditioner_of(bucket).grafts:
        return always
    sound = (roots.refreshed > 0) & (roots.failures < options.max_failures) if bucket.sides else always
    return sound & (step >= options.start_step)


def accumulate(
    roots: Roots,
    g: jax.Array,
    bucket: Bucket,
    sizes: jax.Array,
    *,
    wanted: jax.Array | bool = True,
    on_host: bool = False,
) -> Roots:
    """L <- beta2 L + (1 - beta2) G G' for each preconditioned side, G unfolded along it; sums where beta2 is 1.

    Args:
      roots: a device's blocks.
      g: [n, *shape] float32, their gradients.
      bucket: theirs.
      sizes: [n, sides of a block] int32, their real lengths.
      wanted: scalar; where it is not, all stays as it is.
      on_host: whether the statistics are in host memory.
    """
    beta2, preconditioner = bucket.group.beta2, preconditioner_of(bucket)
    old, new = (1.0, 1.0) if beta2 == 1 else (beta2, 1 - beta2)
    largest = jnp.max(jnp.abs(g), axis=tuple(range(1, g.ndim)))
    exponent = jnp.maximum(roots.exponent, jnp.where((largest > 0) & wanted, jnp.frexp(largest)[1], NO_GRADIENT))
    one = jnp.float32(1)  # ldexp: a power of two to the last bit, which exp2 need not be
    grown = _power(preconditioner.power(len(bucket.sides)) * jnp.maximum(roots.exponent - exponent, -150))
    grown = grown[:, None, None]
    scale = jnp.where(largest > 0, jnp.ldexp(one, -exponent), 0).reshape(-1, *[1] * (g.ndim - 1))
    g = jnp.where(scale > 0, g * scale, 0)
    blocks = blocks_of(roots._replace(exponent=exponent), bucket, sizes)
    blocks = blocks._replace(statistics=lambda: [grown * s for s in blocks_of(roots, bucket, sizes).statistics()])
    statistics = []
    for side, kept in zip(bucket.sides, roots.statistics, strict=True):
        others = [axis for axis in range(1, g.ndim) if axis != side + 1]

        def renewed(kept: jax.Array, x: jax.Array, grown: jax.Array, others: Sequence[int] = others) -> jax.Array:
            product = pack(lax.dot_general(x, x, ((others, others), ((0,), (0,))), precision=lax.Precision.HIGHEST))
            total = old * grown * storage.loaded(kept, product.shape[1:]) + new * product
            return storage.stored(total, kept.dtype, dithered=True)

        x = preconditioner.observed(g, blocks, side)
        statistics.append(residence.updated(kept, renewed, (x, grown), wanted=wanted, on_host=on_host))
    return roots._replace(statistics=tuple(statistics), exponent=exponent)


def _power(exponent: jax.Array) -> jax.Array:
    """2^exponent, to the last bit where it is whole."""
    whole = jnp.floor(exponent)
    return jnp.ldexp(jnp.exp2(exponent - whole), whole.astype(jnp.int32))


def suited(
    roots: Roots,
    slot: jax.Array,
    statistics: Sequence[jax.Array],
    sizes: jax.Array,
    bucket: Bucket,
    options: ShampooOptions,
) -> jax.Array:
    """Which factors of some blocks still suit their statistics, so that solving anew would bring little.

    Args:
      roots: a device's blocks.
      slot: [m] int32, which of them; past the last for none.
      statistics: per preconditioned side [m, r, r] float32, bias-corrected, of gradients divided by 2^exponent.
      sizes: [m, sides of a block] int32, real lengths.
      bucket: the blocks'.
      options: the tolerance; 0 says of none that it is.

    Returns:
      [m] int32, bit k tells it of the k-th preconditioned side.
    """
    result = jnp.zeros(slot.shape, jnp.int32)
    if not options.tolerance:
        return result
    preconditioner, group = preconditioner_of(bucket), bucket.group
    there = slot < roots.refreshed.shape[0]
    found = there & (roots.refreshed.at[slot].get(mode="clip") > 0)
    scale = jnp.exp2(-preconditioner.shift(roots.exponent.at[slot].get(mode="clip"), group))[:, None, None]
    for number, factor in enumerate(_factors(_rows(roots, slot), bucket)):
        misfit = preconditioner.misfit(
            statistics[number],
            factor * scale,
            sizes[:, bucket.sides[number]],
            group,
            options,
            scale_free=grafted(bucket, options),
        )
        result |= (found & (misfit <= options.tolerance)).astype(jnp.int32) << number
    return result


def refresh(
    roots: dict[str, Roots], due: dict[str, Due], buckets: Sequence[Bucket], options: ShampooOptions, *, step: jax.Array
) -> dict[str, Roots]:
    """New factors for the due blocks of one device.

    Matrices of one side length, preconditioner, root order and regulariser are solved in one batch, whatever bucket
    they come from; a batch with nothing due is not solved. Whether a factor is sound its preconditioner says. A block
    accepts those of all its sides or of none; otherwise it keeps what it has, and its failure count grows.

    Args:
      roots: bucket name -> the device's blocks.
      due: bucket name -> which of them are due.
      buckets: the buckets.
      options: solver and bounds.
      step: count of the steps whose gradients are in the statistics.
    """
    updates = step // options.statistics_every
    batches: dict[Any, list[tuple[Bucket, int]]] = {}
    for bucket in buckets:
        group = bucket.group
        for number, side in enumerate(bucket.sides):
            key = (group.preconditioner, bucket.shape[side], group.p, group.ridge, group.cut)
            batches.setdefault(key, []).append((bucket, number))

    on_host = options.statistics_memory == "host"
    due_rows = {
        (b.name, number): statistics_of(residence.rows(statistics, due[b.name].slot, on_host=on_host), b, number)
        / correction(b.group.beta2, updates, options)
        for b in buckets
        for number, statistics in enumerate(roots[b.name].statistics)
    }
    staying = {
        b.name: suited(
            roots[b.name],
            due[b.name].slot,
            [due_rows[b.name, number] for number in range(len(b.sides))],
            due[b.name].sizes,
            b,
            options,
        )
        for b in buckets
        if b.sides
    }
    solved: dict[tuple[str, int], Solved] = {}
    before = None
    for members in batches.values():
        group, preconditioner = members[0][0].group, preconditioner_of(members[0][0])
        wanted = jnp.concatenate(
            [
                (due[b.name].slot < roots[b.name].residual.shape[0]) & (staying[b.name] & 1 << number == 0)
                for b, number in members
            ]
        )
        stack = jnp.concatenate([due_rows[b.name, number] for b, number in members])
        stack = jnp.where(wanted[:, None, None], stack, 0)
        sizes = jnp.concatenate([due[b.name].sizes[:, b.sides[number]] for b, number in members])
        old = None
        if preconditioner.warm:
            old = jnp.concatenate(
                [_factors(_rows(roots[b.name], due[b.name].slot), b)[number] for b, number in members]
            )
        if before is not None and preconditioner.uses_lapack(options):
            # Two LAPACK calls in flight can deadlock on a CPU: the next begins when this one has ended.
            stack, before = lax.optimization_barrier((stack, before))
        batch = lax.cond(
            jnp.any(wanted),
            lambda stack, old, sizes, group=group, preconditioner=preconditioner: preconditioner.solve(
                stack, old, sizes, group, options
            ),
            lambda stack, old, sizes: _unsolved(stack),
            stack,
            old,
            sizes,
        )
        before, first = batch.residual, 0
        for bucket, number in members:
            part = slice(first, first + due[bucket.name].slot.shape[0])
            solved[bucket.name, number] = jax.tree.map(lambda x, part=part: x[part], batch)
            first = part.stop

    result = dict(roots)
    for bucket in buckets:
        if bucket.sides:
            state, slot = roots[bucket.name], due[bucket.name].slot
            numbers = range(len(bucket.sides))
            seen = [jnp.trace(due_rows[bucket.name, k], axis1=-2, axis2=-1) > 0 for k in numbers]
            sides = [solved[bucket.name, k] for k in numbers]
            exponent = state.exponent.at[slot].get(mode="clip")
            fresh = _joined(sides, jnp.stack(seen).all(axis=0), staying[bucket.name], exponent, bucket)
            result[bucket.name] = install(state, slot, fresh, step, bucket)
    return result


def _rows(roots: Roots, slot: jax.Array) -> list[jax.Array]:
    """The factors of some slots, as they are kept."""
    return [x.at[slot].get(mode="clip") for x in roots.roots]


def install(state: Roots, slot: jax.Array, fresh: Fresh, step: jax.Array, bucket: Bucket) -> Roots:
    """Accepted factors take the places of the old ones.

    Args:
      state: a device's blocks.
      slot: [m] int32, where the blocks of `fresh` are; past the last for those that are to be left out.
      fresh: what a refresh has found.
      step: count of the steps whose gradients are in the statistics it was made from.
      bucket: the blocks'.
    """
    staying = [(fresh.suited & 1 << number) > 0 for number in range(len(bucket.sides))]
    new = fresh.accepted & ~functools.reduce(operator.and_, staying)  # that some side has a new factor

    def old(x: jax.Array) -> jax.Array:
        return x.at[slot].get(mode="clip")

    def put(x: jax.Array, new: jax.Array, keep: jax.Array) -> jax.Array:
        new = jnp.where(keep.reshape(-1, *([1] * (x.ndim - 1))), new, old(x))
        return x.at[slot].set(new.astype(x.dtype), mode="drop")

    def worst(of: jax.Array, found: jax.Array, than: Callable[..., jax.Array]) -> jax.Array:
        """The number of a block some of whose sides stay: of those only the block's worst is known."""
        return put(of, jnp.where(fresh.suited > 0, than(found, old(of)), found), new)

    accepted, second_moment = fresh.accepted, state.second_moment
    if second_moment is not None:
        before, after = (_factors(kept, bucket) for kept in (_rows(state, slot), fresh.roots))
        after = [jnp.where(stays[:, None, None], b, a) for stays, b, a in zip(staying, before, after, strict=True)]
        carried = preconditioner_of(bucket).carried(old(second_moment), before, after, bucket.sides)
        second_moment = put(second_moment, carried, new)
    return state._replace(
        second_moment=second_moment,
        roots=tuple(
            put(x, storage.stored(root, x.dtype), accepted & ~stays)
            for x, root, stays in zip(state.roots, fresh.roots, staying, strict=True)
        ),
        residual=worst(state.residual, fresh.residual, jnp.maximum),
        condition=worst(state.condition, fresh.condition, jnp.maximum),
        effective_rank=worst(state.effective_rank, fresh.effective_rank, jnp.minimum),
        refreshed=put(state.refreshed, step, accepted),
        failures=put(state.failures, jnp.where(accepted, 0, old(state.failures) + 1), accepted | fresh.seen),
        refreshes=put(state.refreshes, old(state.refreshes) + 1, accepted),
        spared=tuple(put(x, old(x) + 1, accepted & stays) for x, stays in zip(state.spared, staying, strict=True)),
    )


def _unsolved(stack_nrr: jax.Array) -> Solved:
    nothing = jnp.zeros(len(stack_nrr))
    return Solved(stack_nrr, nothing, nothing, nothing, nothing > 0)


def _joined(sides: Sequence[Solved], seen: jax.Array, suited: jax.Array, exponent: jax.Array, bucket: Bucket) -> Fresh:
    """What was solved side by side, as one answer for each block."""
    # Of the gradients as they are.
    scale = jnp.exp2(preconditioner_of(bucket).shift(exponent, bucket.group))[:, None, None]
    return Fresh(
        roots=tuple(kept_factor(side.factor * scale, bucket) for side in sides),
        residual=jnp.stack([side.residual for side in sides]).max(axis=0),
        condition=jnp.stack([side.condition for side in sides]).max(axis=0),
        effective_rank=jnp.stack([side.effective_rank for side in sides]).min(axis=0),
        accepted=jnp.stack([side.accepted | (suited & 1 << k > 0) for k, side in enumerate(sides)]).all(axis=0),
        seen=seen,
        suited=suited,
    )
