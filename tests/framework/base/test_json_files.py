import dataclasses
import math
from typing import Any

import pytest

from shampax.framework.base.json_files import build


@dataclasses.dataclass(frozen=True)
class Inner:
    values: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Outer:
    count: int
    shape: tuple[int, ...]
    name: str
    inner: Inner | None
    rest: dict[str, Any]


GOOD = {"count": 3, "shape": [2, 4], "name": "a", "inner": {"values": {"loss": 1}}, "rest": {"x": [None]}}


def test_builds_nested_dataclasses():
    """Fault: an integer loss stays an integer, a shape stays a list, or None is taken for a missing key."""
    built = build(Outer, GOOD, "it")
    assert built == Outer(3, (2, 4), "a", Inner({"loss": 1.0}), {"x": [None]})
    assert type(built.inner.values["loss"]) is float and type(built.shape) is tuple
    assert build(Outer, GOOD | {"inner": None}, "it").inner is None
    assert math.isnan(build(Outer, GOOD | {"inner": {"values": {"loss": math.nan}}}, "it").inner.values["loss"])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"count": True}, "it.count must be int"),
        ({"count": -1}, "it.count must be int"),
        ({"count": 2**63}, "it.count must be int"),
        ({"shape": [2, 1.5]}, "it.shape must be int"),
        ({"shape": "24"}, "it.shape must be tuple"),
        ({"name": "\x1b[2J"}, "it.name must be str"),
        ({"inner": {"values": {"loss": "1"}}}, "it.inner.values.loss must be float"),
        ({"inner": {"values": {"loss": 10**400}}}, "it.inner.values.loss must be float"),
        ({"inner": {}}, "it.inner must be a JSON object with values"),
        ({"more": 1}, "it must be a JSON object with count, shape"),
    ],
    ids=str,
)
def test_another_type_is_named(change, name):
    with pytest.raises(ValueError, match=name):
        build(Outer, GOOD | change, "it")
