"""Tables of tokens: lookups, and losses over a vocabulary, whose logits need not be stored.

Shapes in names: B batch, T slots of a row, E embed, V vocab, C chunks of the vocabulary.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from .layout import FSDP_AXIS, SEQUENCE_AXIS, TENSOR_AXIS, axis_size, batch_axes, gather_columns, parts, shard_batch

_SLOTS = 128  # whose logits `token_scores` holds at once
_NEVER = float(jnp.finfo(jnp.float32).min)  # logit of a token that does not exist; finite, so that no gradient is NaN


def look_up(table_VxE: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Return rows of a float32 table, [B, ..., E] in `dtype`; the batch stays sharded.

    The table is gathered in `dtype`. Its gradient is summed in float32: a frequent token occurs thousands of times in a
    batch, and bfloat16 would lose most of them. Each device adds up the gradients of its tokens; the sum over `fsdp`
    leaves each device its columns.
    """
    return _look_up(table_VxE, tokens, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(table_VxE, tokens, dtype):
    return jnp.take(gather_columns(table_VxE.astype(dtype)), tokens, axis=0)


def _look_up_forward(table_VxE, tokens, dtype):
    return _look_up(table_VxE, tokens, dtype), (table_VxE, tokens)


def _look_up_backward(_, saved, gradient):
    table_VxE, tokens = saved
    rows = batch_axes(tokens.shape[0])
    by_position = tokens.ndim > 1 and parts(SEQUENCE_AXIS, tokens.shape[1]) > 1
    axes = (*rows, SEQUENCE_AXIS) if by_position else rows
    axes = axes if any(axis_size(axis) > 1 for axis in axes) else ()  # XLA refuses a sum over axes of size 1 only
    scattered = FSDP_AXIS if FSDP_AXIS in rows and parts(FSDP_AXIS, table_VxE.shape[1]) > 1 else None

    def on_device(tokens, gradient):
        total_VxE = jnp.zeros(table_VxE.shape, jnp.float32).at[tokens].add(gradient.astype(jnp.float32))
        if scattered:
            total_VxE = lax.psum_scatter(total_VxE, scattered, scatter_dimension=1, tiled=True)
        return lax.psum(total_VxE, tuple(axis for axis in axes if axis != scattered))

    if axes:
        on_device = jax.shard_map(
            on_device,
            axis_names={*axes},
            in_specs=P(rows, SEQUENCE_AXIS if by_position else None),
            out_specs=P(None, scattered),
            check_vma=False,
        )
    return on_device(tokens, gradient).astype(table_VxE.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


class ClassLosses(NamedTuple):
    """Sums over the real targets of logits over classes, such as tokens.

    Attributes:
      count: number of targets.
      nats: -log p of the targets.
      correct: number of targets whose logit is the largest; ties count.
      z: log(Z)^2 (PaLM, arXiv 2204.02311, section 5).
      uniform: mean over the classes of -log p, for label smoothing.
    """

    count: jax.Array
    nats: jax.Array
    correct: jax.Array
    z: jax.Array
    uniform: jax.Array


def class_losses(logits: jax.Array, targets: jax.Array, real: jax.Array) -> ClassLosses:
    """Return the float32 sums over targets [...] of logits [..., V] where `real` holds. Unused ones cost nothing."""
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return _sums(real, logsumexp, chosen, logits.max(axis=-1), logits.mean(axis=-1))


def token_logits(x_BxTxE: jax.Array, head_VxE: jax.Array, soft_cap: float = 0.0) -> jax.Array:
    """Return the float32 logits x [B, T, V], or with a soft cap above 0 soft_cap * tanh(x / soft_cap)."""
    logits = jnp.einsum("bte,ve->btv", x_BxTxE, head_VxE, preferred_element_type=jnp.float32)
    return soft_cap * jnp.tanh(logits / soft_cap) if soft_cap else logits


def token_scores(
    x_BxTxE: jax.Array, head_VxE: jax.Array, targets_BxT: jax.Array, soft_cap: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Return the log-probability of each target, float32 [B, T], and whether no logit is larger.

    The logits of a group of slots after the other are computed.
    """
    rows, length = targets_BxT.shape
    size = math.gcd(length, _SLOTS)

    def of_slots(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = token_logits(part[0], head_VxE, soft_cap)
        chosen = jnp.take_along_axis(logits, part[1][..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), chosen >= logits.max(axis=-1)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(rows, length // size, size, *x.shape[2:]), 0, 1)

    found = lax.map(of_slots, (cut(x_BxTxE), cut(targets_BxT)))
    nats, best = (jnp.swapaxes(x, 0, 1).reshape(rows, length) for x in found)
    return nats, best


def token_losses(
    x_BxTxE: jax.Array,
    head_VxE: jax.Array,
    targets_BxT: jax.Array,
    real_BxT: jax.Array,
    chunks: int,
    soft_cap: float = 0.0,
) -> ClassLosses:
    """Return `class_losses` of `token_logits`; with more than one chunk, no array holds the logits of all tokens.

    The logits of one chunk of the vocabulary after the other are computed, and again in the backward pass. The gradient
    of a chunk of the head is complete after its turn, so that it is summed over the devices once; with chunks of slots,
    the gradient of the whole head would be summed in every turn.

    A vocabulary that chunks and the mesh axis `tensor` do not divide is padded with tokens of probability 0.
    """
    vocab, chunks = head_VxE.shape[0], max(chunks, 1)
    padding = -vocab % (chunks * axis_size(TENSOR_AXIS))
    if chunks == 1 and not padding:
        return class_losses(token_logits(x_BxTxE, head_VxE, soft_cap), targets_BxT, real_BxT)
    # Chunk c has the tokens c, c + C, ...: each device cuts its own rows of a sharded table.
    padded = jnp.pad(head_VxE, ((0, padding), (0, 0)))
    head_CxVxE = jnp.swapaxes(padded.reshape(-1, chunks, padded.shape[1]), 0, 1)
    row_BxT, chunk_BxT = jnp.divmod(targets_BxT, chunks)
    wide_BxTxE = x_BxTxE.astype(jnp.float32)  # the loop sums the gradients of the chunks in this type

    def of_chunk(number: jax.Array, part_VxE: jax.Array) -> tuple[jax.Array, ...]:
        logits = token_logits(wide_BxTxE.astype(x_BxTxE.dtype), part_VxE, soft_cap)
        logits = shard_batch(logits, SEQUENCE_AXIS, TENSOR_AXIS)
        sums = (logits.sum(axis=-1),) if soft_cap else ()  # logits of padding are 0
        if padding:
            token_V = jnp.arange(len(part_VxE)) * chunks + number
            logits = jnp.where(token_V < vocab, logits, _NEVER)
        here_BxT = jnp.take_along_axis(logits, row_BxT[..., None], axis=-1)[..., 0]
        chosen_BxT = jnp.where(chunk_BxT == number, here_BxT, 0)
        return jax.nn.logsumexp(logits, axis=-1), chosen_BxT, lax.stop_gradient(logits.max(axis=-1)), *sums

    turn = jax.checkpoint(of_chunk, prevent_cse=False) if chunks > 1 else of_chunk
    found = lax.map(lambda part: turn(*part), (jnp.arange(chunks), head_CxVxE))
    logsumexp_CxBxT, chosen_CxBxT, highest_CxBxT, *sums = found
    if soft_cap:
        mean_BxT = sums[0].sum(axis=0) / vocab
    else:
        mean_BxT = wide_BxTxE @ head_VxE.astype(jnp.float32).mean(axis=0)
    logsumexp_BxT = jax.nn.logsumexp(logsumexp_CxBxT, axis=0)
    return _sums(real_BxT, logsumexp_BxT, chosen_CxBxT.sum(axis=0), highest_CxBxT.max(axis=0), mean_BxT)


def _sums(real: jax.Array, logsumexp: jax.Array, chosen: jax.Array, highest: jax.Array, mean: jax.Array) -> ClassLosses:
    def total(values: jax.Array) -> jax.Array:
        return jnp.where(real, values, 0).sum(dtype=jnp.float32)

    return ClassLosses(
        count=total(jnp.ones_like(chosen)),
        nats=total(logsumexp - chosen),
        correct=total(chosen >= highest),
        z=total(jnp.square(logsumexp)),
        uniform=total(logsumexp - mean),
    )


def real_targets(segments: jax.Array) -> jax.Array:
    """Return which of the targets `[:, 1:]` count: those with their input's segment, which is not 0; bool [B, T]."""
    return (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)


def real_tokens(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the metric "real_tokens": slots of [B, T] that are no padding, and all slots."""
    return (segments > 0).sum(dtype=jnp.float32), jnp.float32(segments.size)
