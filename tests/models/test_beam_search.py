import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampax.models.beam_search import beam_search, take

VOCAB, END, START = 4, 2, 3


def tables(sentences, length, seed=0, spread=1.5):
    """Return log-probabilities [B, N, V, V, V] of the next token after the last two, at each position."""
    scores = np.random.default_rng(seed).normal(size=(sentences, length, VOCAB, VOCAB, VOCAB)) * spread
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


@functools.partial(jax.jit, static_argnames=("beams", "length", "penalty"))
def search(table, beams, length, penalty):
    def step(before_BxK, parents_BxK, tokens_BxK, position):
        before_BxK = take(before_BxK, parents_BxK)
        rows = jnp.arange(len(table))[:, None]
        log_probs = table[rows, position, jnp.where(position > 1, before_BxK, START), tokens_BxK]
        return log_probs, tokens_BxK

    return beam_search(
        step,
        jnp.full((len(table), beams), START),
        batch=len(table),
        beams=beams,
        length=length,
        start=START,
        end=END,
        penalty=penalty,
    )


def log_probs(table, prefix):
    """Return the log-probabilities of one sentence after a prefix, float64 [V]."""
    two = [START, START, *prefix][-2:]
    return table[len(prefix), two[0] if len(prefix) > 1 else START, two[1]]


def divisor(tokens, penalty):
    return ((5 + len(tokens)) / 6) ** penalty


def by_brute_force(table, length, penalty):
    """Return the best of all finished hypotheses."""
    best = (-np.inf, ())
    others = [token for token in range(VOCAB) if token != END]
    for size in range(length):
        for prefix in itertools.product(others, repeat=size):
            tokens = (*prefix, END)
            score = sum(log_probs(table, tokens[:at])[tokens[at]] for at in range(len(tokens)))
            best = max(best, (score / divisor(tokens, penalty), tokens))
    return best


def by_lists(table, beams, length, penalty):
    """Search with lists, in float64."""
    live, finished = [(0.0, ())], []
    for _ in range(length):
        everything = sorted(
            (
                (total + log_probs(table, prefix)[token], (*prefix, token))
                for total, prefix in live
                for token in range(VOCAB)
            ),
            reverse=True,
        )
        finished += [
            (total / divisor(tokens, penalty), tokens) for total, tokens in everything[:beams] if tokens[-1] == END
        ]
        live = [hypothesis for hypothesis in everything if hypothesis[1][-1] != END][:beams]
        if len(finished) >= beams:
            break
    return max(finished) if finished else (live[0][0] / divisor(live[0][1], penalty), live[0][1])


def assert_found(found, expected, length):
    for row, (score, tokens) in enumerate(expected):
        assert found.tokens[row].tolist() == [*tokens, *[END] * (length - len(tokens))]
        np.testing.assert_allclose(found.scores[row], score, rtol=1e-4)
        assert found.finished[row] == (END in tokens)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_with_all_beams_it_searches_all_sequences(penalty):
    """Faults: a wrong penalty; a score without the end token; a finished hypothesis is lost or replaced by a live
    one."""
    length, table = 4, tables(12, 4)
    expected = [by_brute_force(each, length, penalty) for each in table]
    assert_found(search(table, VOCAB**length, length, penalty), expected, length)
    assert len({len(tokens) for _, tokens in expected}) > 1


@pytest.mark.parametrize("beams", [2, 3])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_it_equals_a_search_with_lists(beams, penalty):
    """Faults: hypotheses are mixed up when beams are chosen; a finished sentence continues."""
    table = tables(40, 7, seed=beams)
    expected = [by_lists(each, beams, 7, penalty) for each in table]
    assert_found(search(table, beams, 7, penalty), expected, 7)


def test_one_beam_is_greedy():
    """Fault: the second best continuation is finished as well, which is right only with more beams."""
    table = tables(40, 6, seed=5)
    expected = []
    for each in table:
        tokens, score = (), 0.0
        while len(tokens) < 6 and END not in tokens:
            following = log_probs(each, tokens)
            tokens, score = (*tokens, int(following.argmax())), score + following.max()
        expected.append((score / divisor(tokens, 0.6), tokens))
    assert {END in tokens for _, tokens in expected} == {True, False}
    assert_found(search(table, 1, 6, 0.6), expected, 6)


def test_a_sentence_does_not_depend_on_others_in_the_batch():
    """Fault: a finished sentence gets more hypotheses while others continue."""
    table = tables(16, 8, seed=9, spread=2.5)
    together = search(table, 2, 8, 1.0)
    for row in (0, 5, 11):
        alone = search(table[row : row + 1], 2, 8, 1.0)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[row : row + 1], y), together, alone)
