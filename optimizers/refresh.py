"""Refresh roots: which blocks are due on a step, solving for their factors, and installing accepted factors."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .diagonal import correction
from .linalg.roots import RootResult
from .linalg.symmetric import unpack
from .options import Options
from .plan.blocks import Bucket
from .preconditioners.base import Blocks, PreconditionerState

_TILE = 128


def due_phases(step: jax.Array, options: Options, phases: int) -> tuple[jax.Array, jax.Array]:
    """Return (first, count): the phases first, ..., first + count - 1, modulo `phases`, are due on this step.

    While the interval is k, a step advances by interval / k ticks, and `interval` ticks have `phases` phases, as evenly
    as possible, beginning with the first tick. So every block is refreshed every k steps. When the interval changes,
    phases continue in order. A refresh is omitted if another follows before `start_step`.

    Args:
      step: int32, number of the step, from 1.
      options: options of the optimizer.
      phases: number of phases of the plan.
    """
    ticks, advance, before = jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32), 0
    for last, interval in reversed(options.early):
        advance = jnp.where(step <= last, options.interval // interval, advance)
    for last, interval in options.early:
        ticks += jnp.clip(step - 1 - before, 0, last - before) * (options.interval // interval)
        before = last
    # Operands are not negative, so `lax.rem` is correct; it compiles to less code than `%`.
    ticks = lax.rem(ticks + jnp.maximum(step - 1 - before, 0), jnp.int32(options.interval))
    first, after = (_ceil(x * phases, options.interval) for x in (ticks, ticks + advance))
    return lax.rem(first, jnp.int32(phases)), jnp.where(step >= _first_due(options), after - first, 0)


def phases_due(step: int, options: Options) -> int:
    """Return the count of `due_phases` with as many phases as the interval has steps, on the host."""
    interval = next((interval for last, interval in options.early if step <= last), options.interval)
    return options.interval // interval if step >= _first_due(options) else 0


def _ceil(x: Any, y: Any) -> Any:
    return (x + y - 1) // y


def _first_due(options: Options) -> int:
    return options.start_step - options.interval - (options.delay if options.refresh == "host" else 0)


def refresh(
    states: dict[str, PreconditionerState],
    due: Mapping[str, jax.Array],
    blocks: Mapping[str, Blocks],
    step: jax.Array,
    accepted: jax.Array,
) -> dict[str, PreconditionerState]:
    """Refresh the blocks of one device that are due on this step.

    Args:
      states: bucket name -> state of the device's blocks, with this step's statistics.
      due: bucket name -> [1, phases, window] int32, slots due in each phase, the number of slots as padding.
      blocks: bucket name -> the device's blocks.
      step: int32, number of this step, from 1.
      accepted: bool, whether the step is accepted; otherwise nothing changes.
    """
    options, phases = next(((each.options, each.bucket.phases) for each in blocks.values()), (None, 0))
    if options is None or options.refresh == "host":
        return states
    first, count = due_phases(step, options, phases)

    def renew(number: jax.Array, written: dict[str, PreconditionerState]) -> dict[str, PreconditionerState]:
        phase = lax.rem(first + number, jnp.int32(phases))
        slots, chosen, whole = {}, {}, {}
        for name, (bucket, sizes, _) in blocks.items():
            slots[name] = due[name][0, phase]
            chosen[name] = Blocks(bucket, sizes.at[slots[name]].get(mode="clip"), options)
            whole[name] = with_statistics(written[name], states[name])
        return {name: without_statistics(x) for name, x in _solved(whole, slots, chosen, step).items()}

    # The loop would copy the statistics, which a refresh only reads.
    written = {name: without_statistics(state) for name, state in states.items()}
    with jax.named_scope(f"{phases}_in_{options.interval}"):  # for planning
        written = lax.fori_loop(0, jnp.where(accepted, count, 0), renew, written)
    return {name: with_statistics(new, states[name]) for name, new in written.items()}


def install(
    state: PreconditionerState,
    slot: jax.Array,
    new: RootResult,
    scale_log2: jax.Array,
    step: jax.Array,
    bucket: Bucket,
) -> PreconditionerState:
    """Write accepted factors to their slots.

    Args:
      state: state of a device's blocks.
      slot: [m] int32, slots of the blocks in `new`; number of slots for blocks to ignore.
      new: result of a refresh, with a tuple of roots, one per preconditioned side.
      scale_log2: [m] int32, binary scale of the solved statistics.
      step: int32, number of steps in the statistics.
      bucket: bucket of the blocks.
    """
    slots = len(state.residual)
    hits = slot == jnp.arange(slots)[:, None]
    here, row = jnp.any(hits, axis=1), jnp.argmax(hits, axis=1)
    accepted, seen = new.accepted[row], new.largest[row] > 0

    def put(x: jax.Array, found: jax.Array) -> jax.Array:
        found = found.astype(x.dtype)
        if len(slot) > 1:
            return x.at[jnp.where(new.accepted, slot, slots)].set(found, mode="drop")
        # In place, without reading other slots; and it compiles to less than a scatter.
        at = jnp.minimum(slot[0], slots - 1)
        kept = lax.dynamic_index_in_dim(x, at)
        return lax.dynamic_update_index_in_dim(x, jnp.where(new.accepted[0] & (slot[0] < slots), found, kept), at, 0)

    second_moment = state.second_moment
    if second_moment is not None:
        old = [x.at[slot].get(mode="clip").astype(jnp.float32) for x in state.roots]
        moment = second_moment.at[slot].get(mode="clip")
        second_moment = put(second_moment, bucket.preconditioner.carried(moment, old, new.root, bucket.sides))
    failures = state.failures + (here & ~accepted & seen).astype(jnp.int32)
    return state._replace(
        second_moment=second_moment,
        roots=tuple(put(x, root) for x, root in zip(state.roots, new.root, strict=True)),
        roots_scale_log2=put(state.roots_scale_log2, scale_log2),
        residual=put(state.residual, new.residual),
        condition=put(state.condition, new.condition),
        effective_rank=put(state.effective_rank, new.effective_rank),
        refreshed=jnp.where(here & accepted, step, state.refreshed),
        failures=jnp.where(here & accepted, 0, failures),
        refreshes=state.refreshes + (here & accepted).astype(jnp.int32),
    )


def _solved(
    states: dict[str, PreconditionerState],
    slots: dict[str, jax.Array],
    blocks: dict[str, Blocks],
    step: jax.Array,
) -> dict[str, PreconditionerState]:
    """Solve for the due blocks, in `slots` [window] with the number of slots as padding; install accepted factors.

    Matrices with the same side length, preconditioner, root order and regulariser are solved in one batch, across
    buckets, with as many places as matrices can be due at once on a device. A batch with no due block is skipped. If
    the factors of any side are rejected, the block keeps its old factors and its failure count grows.
    """

    def rows(x: jax.Array, name: str) -> jax.Array:
        return x.at[slots[name]].get(mode="clip")

    def statistics(bucket: Bucket, number: int) -> jax.Array:
        state, side = states[bucket.name], bucket.sides[number]
        packed = rows(state.statistics[number], bucket.name)
        age = rows(state.age, bucket.name) + bucket.preconditioner.prior(len(bucket.sides))
        return unpack(packed / correction(bucket.beta2, age, packed.ndim), bucket.shape[side])

    found: dict[tuple[str, int], RootResult] = {}
    before = None
    for length, members in _batches(list(blocks.values())):
        bucket, options = members[0][0], blocks[members[0][0].name].options
        preconditioner = bucket.preconditioner
        places = _Places.of(members, slots)
        stack = places.chosen([statistics(b, number) for b, number in members], length)
        sizes = places.chosen([blocks[b.name].sizes[:, b.sides[number]] for b, number in members])
        old = None
        if preconditioner.warm:
            own = [rows(states[b.name].roots[number], b.name).astype(jnp.float32) for b, number in members]
            old = places.chosen(own, length)
        if before is not None and preconditioner.uses_lapack(options):
            # Two concurrent LAPACK calls can deadlock a CPU, so each waits for the one before it.
            stack, before = lax.optimization_barrier((stack, before))
        batch = lax.cond(
            jnp.any(places.taken),
            lambda stack, old, sizes, bucket=bucket, options=options: bucket.preconditioner.solve(
                stack, old, Blocks(bucket, sizes, options)
            ),
            lambda stack, old, sizes: _unsolved(stack),
            stack,
            old,
            sizes,
        )
        before = batch.residual
        for (b, number), place in zip(members, places.of_members, strict=True):
            own, side = jax.tree.map(lambda x, place=place: x[place], batch), b.shape[b.sides[number]]
            found[b.name, number] = own._replace(root=own.root[:, :side, :side])

    result = dict(states)
    for name, (bucket, *_) in blocks.items():
        if bucket.sides:
            sides = _joined([found[name, number] for number in range(len(bucket.sides))])
            scale_log2 = rows(states[name].scale_log2, name)
            result[name] = install(states[name], slots[name], sides, scale_log2, step, bucket)
    return result


class _Places(NamedTuple):
    """The places of a batch, which the due matrices of its members share.

    Attributes:
      matrix: [places] index among the matrices of all members, in order; any for a free place.
      taken: [places] bool.
      of_members: for each member [window], the places of its matrices; any for a matrix that is not due.
    """

    matrix: jax.Array
    taken: jax.Array
    of_members: list[jax.Array]

    @classmethod
    def of(cls, members: Sequence[tuple[Bucket, int]], slots: Mapping[str, jax.Array]) -> "_Places":
        """Give each due matrix a place."""
        due = [bucket.due < bucket.slots.shape[1] for bucket, _ in members]
        count = int(np.max(sum(each.sum(axis=2) for each in due)))
        wanted = jnp.concatenate([slots[bucket.name] < bucket.slots.shape[1] for bucket, _ in members])
        ends = np.cumsum([each.shape[2] for each in due])[:-1]
        if count == len(wanted):
            matrix = place = jnp.arange(count)
            return cls(matrix, wanted, jnp.split(place, ends))
        place = jnp.cumsum(wanted) - 1
        there = wanted & (place == jnp.arange(count)[:, None])
        return cls(jnp.argmax(there, axis=1), jnp.any(there, axis=1), jnp.split(jnp.maximum(place, 0), ends))

    def chosen(self, of_members: Sequence[jax.Array], length: int = 0) -> jax.Array:
        """Return [places, ...] of arrays [window, ...] of all members, padded to matrices of `length`; 0 if free."""
        x = jnp.concatenate([jnp.pad(x, [(0, 0), *[(0, length - side) for side in x.shape[1:]]]) for x in of_members])
        taken = self.taken.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(taken, x[self.matrix] if len(x) > len(self.matrix) else x, 0)


def _batches(due: Sequence[Blocks]) -> list[tuple[int, list[tuple[Bucket, int]]]]:
    """Return (side length, [(bucket, index into its preconditioned sides)]) of each batch.

    All sides up to _TILE share a batch: an accelerator pads them to a tile anyway, and each length compiles a solver.
    """
    batches: dict[Any, list[tuple[Bucket, int]]] = {}
    for bucket, _, options in due:
        for number, side in enumerate(bucket.sides):
            length = bucket.shape[side]
            joins = length <= _TILE and not bucket.preconditioner.uses_lapack(options)
            kind = (bucket.preconditioner.name, bucket.p, bucket.ridge, bucket.cut)
            batches.setdefault((*kind, 0 if joins else length), []).append((bucket, number))
    return [(max(b.shape[b.sides[number]] for b, number in members), members) for members in batches.values()]


def with_statistics(state: PreconditionerState, full: PreconditionerState) -> PreconditionerState:
    """Return the state with the statistics of another."""
    return state._replace(statistics=full.statistics, scale_log2=full.scale_log2, age=full.age)


def without_statistics(state: PreconditionerState) -> PreconditionerState:
    """Return the state without statistics, for programs that only write roots."""
    nothing: Any = None
    return state._replace(statistics=(), scale_log2=nothing, age=nothing)


def _unsolved(stack_nrr: jax.Array) -> RootResult:
    nothing = jnp.zeros(len(stack_nrr), jnp.float32)
    return RootResult(stack_nrr, nothing, nothing, nothing, nothing, nothing > 0)


def _joined(sides: Sequence[RootResult]) -> RootResult:
    """Join the results of all sides: the worst number of each block, accepted if all sides are accepted."""
    root, residual, largest, condition, rank, accepted = zip(*sides, strict=True)
    return RootResult(
        root=root,
        residual=functools.reduce(jnp.maximum, residual),
        largest=functools.reduce(jnp.minimum, largest),
        condition=functools.reduce(jnp.maximum, condition),
        effective_rank=functools.reduce(jnp.minimum, rank),
        accepted=functools.reduce(jnp.logical_and, accepted),
    )
