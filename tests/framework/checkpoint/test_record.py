import dataclasses
import json
import math

import pytest

from shampax.framework.base.errors import UserError
from shampax.framework.checkpoint.record import Ranking, Record

GOOD = dataclasses.asdict(Record(3, 1.5, 10, data="abc").with_evaluation({"loss": 2.0}, Ranking()))


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
def test_invalid_records_are_refused(change):
    """Faults: an error other than ValueError reaches the user as a traceback; a value is read as another type."""
    with pytest.raises(ValueError, match=r"^the record"):
        Record.from_json(json.loads(json.dumps(GOOD | change)))


def test_a_record_may_have_integer_seconds_and_a_nan_loss():
    read = Record.from_json(GOOD | {"seconds": 2, "last": {"step": 3, "values": {"loss": math.nan}}})
    assert (type(read.seconds), read.seconds) == (float, 2.0)
    assert math.isnan(read.last.values["loss"])


def test_a_best_value_of_another_metric_is_ignored():
    """Fault: KeyError when the config has another best metric."""
    record = (
        Record(3)
        .with_evaluation({"loss": 2.0}, Ranking())
        .with_evaluation({"loss": 3.0, "error": 0.5}, Ranking("error"))
    )
    assert record.best.values["error"] == 0.5


def test_json_round_trip():
    record = Record(3, 1.5, 10, data="abc").with_evaluation({"loss": 2.0}, Ranking())
    assert Record.from_json(json.loads(json.dumps(dataclasses.asdict(record)))) == record


def test_best_evaluation_is_the_lowest_finite_one():
    record, best = Record(), []
    for step, loss in enumerate([math.nan, 3.0, math.nan, 2.0, 2.5, -math.inf], start=1):
        record = Record(step=step, last=record.last, best=record.best).with_evaluation({"loss": loss}, Ranking())
        best.append(record.best.step)
    assert best == [1, 2, 2, 4, 4, 4]
    assert record.last.step == 6


def test_the_direction_of_a_metric_comes_from_its_name():
    """Fault: with best_metric=accuracy alone, the worst checkpoint is kept."""
    for name in ("loss", "log_loss", "word_error", "bits_per_byte", "nats_per_token", "masked_loss"):
        assert Ranking.of(name, "auto").mode == "min"
    for name in ("accuracy", "masked_accuracy", "next_sentence_accuracy", "top5", "auc", "bleu"):
        assert Ranking.of(name, "auto").mode == "max"
    assert Ranking.of("calibration", "max").mode == "max"
    with pytest.raises(UserError, match=r"best_metric='calibration': its direction is not known. Set .*best_mode"):
        Ranking.of("calibration", "auto")
