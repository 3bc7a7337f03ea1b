"""Bounds of knobs, declared with their types: `size: Annotated[int, Within(1, 1024)] = 8`."""

import functools
import math
import typing
from typing import Any, NamedTuple


class Within(NamedTuple):
    """Bounds of a number, both included."""

    least: float
    most: float = math.inf

    def __str__(self) -> str:
        most = "" if self.most == math.inf else f" and at most {self.most:,}"
        return f"at least {self.least:,}{most}"


def check(section: str, knobs: Any) -> None:
    """Raise ValueError if a field of a dataclass is outside the bounds of its annotation.

    Args:
      section: start of the knobs' names, for the error: "data".
      knobs: the instance.
    """
    for name, bound in _bounds(type(knobs)).items():
        value = getattr(knobs, name)
        if not bound.least <= value <= bound.most:
            raise ValueError(f"{section}.{name}={value}: must be {bound}")


@functools.cache
def _bounds(knobs: type) -> dict[str, Within]:
    hints = typing.get_type_hints(knobs, include_extras=True).items()
    return {
        name: bound for name, hint in hints for bound in getattr(hint, "__metadata__", ()) if isinstance(bound, Within)
    }
