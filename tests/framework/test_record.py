import json
import math

import pytest

from shampax.framework.record import Record


def test_survives_json():
    record = Record(3, 1.5, 10, data="abc").with_evaluation({"loss": 2.0}, "loss")
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize(
    "content",
    [None, [], {}, Record().to_json() | {"step": "3"}, Record().to_json() | {"last": {"step": 1}}, {"more": 1}],
    ids=str,
)
def test_anything_else_is_refused(content):
    with pytest.raises(ValueError, match=r"no (record|evaluation)"):
        Record.from_json(content)


def test_best_evaluation_is_the_lowest_finite_one():
    record, best = Record(), []
    for step, loss in enumerate([math.nan, 3.0, math.nan, 2.0, 2.5, -math.inf], start=1):
        record = Record(step=step, last=record.last, best=record.best).with_evaluation({"loss": loss}, "loss")
        best.append(record.best.step)
    assert best == [1, 2, 2, 4, 4, 4]
    assert record.last.step == 6


def test_batches_up_to_the_spike_are_passed_over():
    """Step t trains on batch t - 1 + what was passed over before."""
    earlier, now = Record(step=15), Record(step=19, seconds=4.0, batches_passed_over=0)
    once = earlier.rolled_back(now, spike=18)
    assert (once.step, once.batches_passed_over, once.rollbacks, once.seconds) == (15, 3, 1, 4.0)
    assert 15 + once.batches_passed_over == 18  # the batch of the next step follows that of the spike, number 17
    twice = Record(step=15).rolled_back(once, spike=17)
    assert (twice.batches_passed_over, twice.rollbacks) == (5, 2)
