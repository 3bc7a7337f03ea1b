"""Test the evaluation of held-out batches."""

import numpy as np

from shampax.framework.step import evaluation


def test_predictions_are_those_of_the_examples_without_padding():
    """Faults: the padding of the last batch is judged; a signal before the first batch ends in a traceback."""
    batches = [np.arange(4), np.arange(4, 8)]
    found = evaluation.predict(lambda variables, batch: {"double": variables * batch}, 2, batches, 6)
    np.testing.assert_array_equal(found["double"], 2 * np.arange(6))
    assert evaluation.predict(lambda variables, batch: {"double": batch}, 2, [], 6) == {}
