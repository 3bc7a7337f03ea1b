"""Beam search under jit, batched, with the length penalty of GNMT (arXiv 1609.08144, equation 14, without coverage).

The score of a hypothesis is log P(Y) / ((5 + |Y|) / 6)^penalty; its end counts as one of the |Y| tokens. Live and
finished hypotheses are kept apart. Of the best `beams` continuations at a position, those that end are finished; the
best `beams` of those that do not end stay live. A sentence is done when `beams` hypotheses have finished; its result
does not depend on other sentences of the batch. With one beam this is greedy decoding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .layout import shard_batch

Step = Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Translations(NamedTuple):
    """The best hypothesis of each sentence.

    Attributes:
      tokens: int32 [B, length]; filled with the end token after a hypothesis ends.
      scores: float32 [B], log-probability under the length penalty.
      finished: bool [B]; False if no hypothesis has ended, and the best live one is returned.
    """

    tokens: jax.Array
    scores: jax.Array
    finished: jax.Array


class _Search(NamedTuple):
    position: jax.Array
    last_BxK: jax.Array  # latest tokens of the live hypotheses
    parents_BxK: jax.Array  # hypotheses of the previous position that they continue
    live_BxKxN: jax.Array
    logs_BxK: jax.Array  # of the live ones, without penalty; -inf for absent ones
    finished_BxKxN: jax.Array
    scores_BxK: jax.Array  # of the finished ones, with penalty; -inf for absent ones
    state: Any


def length_penalty(length: jax.Array | int, penalty: float) -> jax.Array:
    """Return the divisor of log-probabilities, ((5 + length) / 6)^penalty."""
    return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** penalty


def beam_search(
    step: Step, state: Any, *, batch: int, beams: int, length: int, start: int, end: int, penalty: float
) -> Translations:
    """Return the best continuation of `start` for each of `batch` sentences, of at most `length` tokens.

    Args:
      step: `(state, parents_BxK, tokens_BxK, position) -> (log_probs_BxKxV, state)`: predicts the token after a
        position, 0 for `start`. Hypothesis k continues hypothesis `parents[:, k]` of the previous position; the step
        reorders the state accordingly.
      state: state of the step at position 0; arrays that keep their shapes.
      batch: number of sentences, B.
      beams: number of hypotheses of each, K.
      length: most tokens of a hypothesis, N, including the end.
      start: the token before the first.
      end: the token that ends a hypothesis.
      penalty: exponent of the length penalty; 0 prefers short translations, 1 is nearly the mean per token.
    """

    def put(search: _Search) -> _Search:
        log_probs_BxKxV, state = step(search.state, search.parents_BxK, search.last_BxK, search.position)
        vocab = log_probs_BxKxV.shape[-1]
        all_BxC = shard_batch((search.logs_BxK[:, :, None] + log_probs_BxKxV).reshape(batch, beams * vocab))
        # One continuation of each live hypothesis ends, so at least `beams` of these do not.
        logs_BxC, chosen_BxC = jax.lax.top_k(all_BxC, min(2 * beams, beams * vocab))
        parents_BxC, tokens_BxC = chosen_BxC // vocab, chosen_BxC % vocab
        ends_BxC = tokens_BxC == end
        among_best_C = jnp.arange(logs_BxC.shape[1]) < beams

        live_logs_BxK, living_BxK = jax.lax.top_k(jnp.where(ends_BxC, -jnp.inf, logs_BxC), beams)
        parents_BxK, tokens_BxK = take(parents_BxC, living_BxK), take(tokens_BxC, living_BxK)
        live_BxKxN = take(search.live_BxKxN, parents_BxK).at[:, :, search.position].set(tokens_BxK)

        # The arrays already hold the end token after the last token of a hypothesis that ends.
        done_B = jnp.isfinite(search.scores_BxK).all(axis=1)
        ended_BxC = jnp.where(ends_BxC & among_best_C & ~done_B[:, None], logs_BxC, -jnp.inf)
        ended_BxC /= length_penalty(search.position + 1, penalty)
        ended_BxCxN = take(search.live_BxKxN, parents_BxC)
        scores_BxK, kept_BxK = jax.lax.top_k(jnp.concatenate([search.scores_BxK, ended_BxC], axis=1), beams)
        finished_BxKxN = take(jnp.concatenate([search.finished_BxKxN, ended_BxCxN], axis=1), kept_BxK)
        return _Search(
            position=search.position + 1,
            last_BxK=shard_batch(tokens_BxK),
            parents_BxK=shard_batch(parents_BxK),
            live_BxKxN=shard_batch(live_BxKxN),
            logs_BxK=shard_batch(live_logs_BxK),
            finished_BxKxN=shard_batch(finished_BxKxN),
            scores_BxK=shard_batch(scores_BxK),
            state=state,
        )

    def continues(search: _Search) -> jax.Array:
        return (search.position < length) & ~jnp.isfinite(search.scores_BxK).all()

    nothing_BxKxN = shard_batch(jnp.full((batch, beams, length), end, jnp.int32))
    none_BxK = shard_batch(jnp.full((batch, beams), -jnp.inf, jnp.float32))
    first = _Search(
        position=jnp.zeros((), jnp.int32),
        last_BxK=shard_batch(jnp.full((batch, beams), start, jnp.int32)),
        parents_BxK=shard_batch(jnp.zeros((batch, beams), jnp.int32)),
        live_BxKxN=nothing_BxKxN,
        logs_BxK=none_BxK.at[:, 0].set(0.0),  # all hypotheses are still the same
        finished_BxKxN=nothing_BxKxN,
        scores_BxK=none_BxK,
        state=state,
    )
    last = jax.lax.while_loop(continues, put, first)
    finished_B = jnp.isfinite(last.scores_BxK[:, 0])
    cut_B = last.logs_BxK[:, 0] / length_penalty(length, penalty)
    return Translations(
        tokens=jnp.where(finished_B[:, None], last.finished_BxKxN[:, 0], last.live_BxKxN[:, 0]),
        scores=jnp.where(finished_B, last.scores_BxK[:, 0], cut_B),
        finished=finished_B,
    )


def take(x: jax.Array, numbers: jax.Array) -> jax.Array:
    """Return rows of x [B, K, ...] by their indices [B, J] within each example: [B, J, ...]."""
    return jax.vmap(lambda rows, chosen: rows[chosen])(x, numbers)
