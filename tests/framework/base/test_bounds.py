import dataclasses
from typing import Annotated

import pytest

from shampax.framework.base import bounds
from shampax.framework.base.bounds import Within
from shampax.framework.data.clicks import ClickData
from shampax.framework.data.images import ImageData
from shampax.framework.data.masked import MaskedTextData
from shampax.framework.data.pairs import PairData
from shampax.framework.data.text import TextData


@dataclasses.dataclass(frozen=True)
class Knobs:
    size: Annotated[int, Within(1, 8)] = 4
    free: int = -(2**50)
    share: Annotated[float, Within(0)] = 0.5


def test_bounds_are_included():
    """Faults: a value at a bound is refused; one beyond it is accepted."""
    for fields in ({}, {"size": 1}, {"size": 8}, {"share": 0.0}, {"share": 2.0**70}):
        bounds.check("data", Knobs(**fields))
    for fields, message in (
        ({"size": 0}, "data.size=0: must be at least 1 and at most 8"),
        ({"size": 9}, "data.size=9: must be at least 1 and at most 8"),
        ({"share": float("nan")}, "data.share=nan: must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            bounds.check("data", Knobs(**fields))


@pytest.mark.parametrize("data", [TextData, MaskedTextData, PairData, ImageData, ClickData])
def test_every_number_of_a_data_set_has_a_bound(data):
    """Fault: a huge or negative number of a new knob exhausts the memory, or is a traceback."""
    fractions = {"heldout_fraction", "mask_rate"}
    numbers = {field.name for field in dataclasses.fields(data) if type(field.default) in (int, float)}
    assert numbers <= set(bounds._bounds(data))
    large = {"sequence_length", "vocab_size", "source_length", "target_length", "image_size", "classes", "workers"}
    for name in large & numbers:
        with pytest.raises(ValueError, match=f"data.{name}=1099511627776: must be at least .* and at most"):
            data(**{name: 2**40})
    for name in fractions & {field.name for field in dataclasses.fields(data)}:
        for value in (0.0, 1e9, float("nan")):
            with pytest.raises(ValueError, match=f"data.{name}={value}: must be"):
                data(**{name: value})
