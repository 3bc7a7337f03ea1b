import json

import pytest

from shampax.framework.base.errors import UserError
from shampax.framework.data.reading.malformed import Malformed, Rejects


def mixed(good, bad):
    return [*range(good), *(Malformed(f"a.tsv, row {row}", "1 columns, expected 3") for row in bad), good]


def test_usable_records_stay_in_order_and_malformed_ones_are_counted():
    """Faults: a record next to a malformed one is lost; the limit is too low by one."""
    rejects = Rejects(2)
    assert list(rejects.sift(mixed(3, [4, 9]))) == [0, 1, 2, 3]
    assert rejects.count == 2
    rejects.refuse_excess()


def test_the_error_has_the_count_the_limit_and_the_places():
    """Fault: the error names no place, or thousands."""
    with pytest.raises(UserError) as caught:
        list(Rejects(0).sift(mixed(3, [4])))
    assert str(caught.value) == (
        "data.max_malformed=0: 1 record is malformed (a.tsv, row 4: 1 columns, expected 3). "
        "Repair the data or raise the limit to skip them."
    )
    with pytest.raises(UserError, match=r"=1500: 1,501 records are malformed .*row 5: [^;]*; and 1496 more\)"):
        list(Rejects(1500).sift(mixed(0, range(1, 4000))))


def test_noted_records_count_again():
    """Fault: a note of skipped records loses some in JSON."""
    rejects = Rejects(10)
    list(rejects.sift(mixed(0, range(1, 9))))
    noted = json.loads(json.dumps(rejects.to_json()))
    assert str(Rejects(10, **noted)) == str(rejects)
    with pytest.raises(UserError, match="=7: 8 records"):
        Rejects(7, **noted).refuse_excess()
