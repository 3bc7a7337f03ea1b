import dataclasses
import math

import pytest

from shampax.framework.base.values import convert


@dataclasses.dataclass(frozen=True)
class Inner:
    values: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Outer:
    count: int
    shape: tuple[int, ...]
    inner: Inner | None


GOOD = {"count": 3, "shape": [2, 4], "inner": {"values": {"loss": 1}}}


def test_builds_nested_dataclasses():
    """Fault: an integer loss stays an integer, a shape stays a list, or None is taken for a missing key."""
    built = convert(GOOD, Outer)
    assert built == Outer(3, (2, 4), Inner({"loss": 1.0}))
    assert type(built.inner.values["loss"]) is float and type(built.shape) is tuple
    assert convert(GOOD | {"inner": None}, Outer).inner is None
    assert math.isnan(convert(GOOD | {"inner": {"values": {"loss": math.nan}}}, Outer).inner.values["loss"])


@pytest.mark.parametrize(
    "change",
    [
        {"count": True},
        {"count": 2**63},
        {"shape": [2, 1.5]},
        {"shape": "24"},
        {"inner": {"values": {"loss": "1"}}},
        {"inner": {"values": {"loss": 10**400}}},
        {"inner": 3},
        {"inner": {}},
        {"more": 1},
    ],
    ids=str,
)
def test_another_type_is_refused(change):
    with pytest.raises(TypeError):
        convert(GOOD | change, Outer)
