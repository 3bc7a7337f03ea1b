"""Scores of continuations against the logits of whole rows."""

import jax
import numpy as np
from jax.sharding import AxisType
from lm_cases import SMALL, batch_of, logits_of, variables_of

from shampax.framework.generation.scoring import Scorer

PAIRS = [([5], [1, 2]), ([*range(9)], [*range(20, 60)]), ([3, 4], [7]), ([8], []), ([6] * 30, [9] * 10)]


def test_scores_in_batches_on_a_mesh():
    """Faults: a continuation is scored one token off, or with its padding; rows are returned in the order of length."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    variables = variables_of(SMALL)
    rows = np.zeros((len(PAIRS), 65), np.int32)
    for row, (text, continuation) in zip(rows, PAIRS, strict=True):
        row[: len(text) + len(continuation)] = [*text, *continuation]
    batch = batch_of([[1] * 65] * len(PAIRS)) | {"tokens": rows}
    nats = np.asarray(jax.nn.log_softmax(logits_of(SMALL, variables, batch)))
    best = [[*nats[0, 0].argsort()[-1:]]]
    with jax.set_mesh(mesh):
        scorer = Scorer(SMALL, mesh, 3)
        found = scorer.scores(variables, PAIRS)
        [greedy] = scorer.scores(variables, [([5], best[0])])
    for row, (text, continuation), score in zip(range(len(PAIRS)), PAIRS, found, strict=True):
        places = np.arange(len(continuation)) + len(text) - 1
        np.testing.assert_allclose(score.nats, nats[row, places, continuation].sum(), rtol=1e-5, atol=1e-6)
    assert [score.greedy for score in found] == [False, False, False, True, False] and greedy.greedy
