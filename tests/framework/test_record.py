import json
import math

import pytest

from shampax.framework.record import Record

GOOD = Record(3, 1.5, 10, data="abc").with_evaluation({"loss": 2.0}, "loss").to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"step": True},
        {"step": -1},
        {"step": 2**63},
        {"step": 3.0},
        {"seconds": math.nan},
        {"seconds": 10**400},
        {"seconds": "1"},
        {"data": 3},
        {"more": 1},
        {"last": []},
        {"last": {"step": 3}},
        {"last": {"step": math.inf, "values": {}}},
        {"last": {"step": "3", "values": {}}},
        {"best": {"step": 3, "values": {"loss": 10**400}}},
        {"best": {"step": 3, "values": {"loss": "2"}}},
        {"best": {"step": 3, "values": [2.0]}},
    ],
    ids=str,
)
def test_what_is_no_record_is_refused(change):
    """Catches any error but ValueError, which would reach the user as a traceback, and values taken for others."""
    with pytest.raises(ValueError, match=r"no record of a run|no evaluation"):
        Record.from_json(json.loads(json.dumps(GOOD | change)))


def test_a_record_may_have_whole_seconds_and_a_loss_that_is_no_number():
    read = Record.from_json(GOOD | {"seconds": 2, "last": {"step": 3, "values": {"loss": math.nan}}})
    assert (type(read.seconds), read.seconds) == (float, 2.0)
    assert math.isnan(read.last.values["loss"])


def test_a_best_of_another_metric_is_no_best():
    """Catches a run that ends in a KeyError once its config has another best metric."""
    record = Record(3).with_evaluation({"loss": 2.0}, "loss").with_evaluation({"loss": 3.0, "error": 0.5}, "error")
    assert record.best.values["error"] == 0.5
