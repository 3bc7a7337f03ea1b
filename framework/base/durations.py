"""One notion of duration for the whole framework: "600 steps", "2 epochs", "1e6 examples", "5e6 tokens", "10%"."""

import dataclasses
import difflib
import fractions
import math
import re

from .errors import UserError

UNITS = ("steps", "epochs", "examples", "tokens", "%")
# Two digits of exponent at most: exact arithmetic on "1e999999999" would fill the memory.
_FORM = re.compile(r"\s*(?P<number>[0-9][0-9_]*(\.[0-9]+)?([eE]\+?[0-9]{1,2})?)\s*(?P<unit>%|[A-Za-z]+|)\s*")
_COUNTS = "600 steps, 2 epochs, 1e6 examples or 5e6 tokens"
_EXAMPLES = f"{_COUNTS}, or 10% of the run"


@dataclasses.dataclass(frozen=True)
class Units:
    """What one run needs to turn any duration into steps.

    Attributes:
      batch_size: examples per step, over all devices and micro-batches.
      examples_per_epoch: examples of the training set.
      tokens_per_example: tokens of one example; 1 where examples are no text.
      total_steps: steps of the whole run; None while these are being worked out, when percent means nothing yet.
    """

    batch_size: int
    examples_per_epoch: int
    tokens_per_example: int
    total_steps: int | None = None


def to_steps(duration: str | int, units: Units) -> int:
    """Steps that a duration takes, rounded up to whole steps; a plain number is steps already.

    Exact: "0.1 epochs" of 1,000 examples is 100 examples, whatever 0.1 is in binary.

    Raises:
      UserError: not a duration; half a step; a percentage where the length of the run is itself in question.
    """
    number, unit = _parse(duration)
    if unit == "steps":
        if number.denominator != 1:
            raise UserError(f"duration {duration!r} is no whole number of steps; use {math.ceil(number)} steps")
        return int(number)
    if unit == "%":
        if units.total_steps is None:
            raise UserError(f"duration {duration!r} cannot set the length of the run it is a part of; use {_COUNTS}")
        return math.ceil(number * units.total_steps / 100)
    examples = {
        "epochs": number * units.examples_per_epoch,
        "examples": number,
        "tokens": number / units.tokens_per_example,
    }[unit]
    return math.ceil(examples / units.batch_size)


def is_duration(text: str) -> bool:
    """Whether a text has the form of a duration: a number and one of the units."""
    match = _FORM.fullmatch(text)
    return match is not None and _plural(match["unit"]) in UNITS


def _plural(unit: str) -> str:
    return unit if unit.endswith(("s", "%")) else f"{unit or 'step'}s"


def _parse(duration: str | int) -> tuple[fractions.Fraction, str]:
    match = _FORM.fullmatch(str(duration))
    if match is None:
        raise UserError(f"{duration!r} is not a duration; write a number and a unit: {_EXAMPLES}")
    unit = _plural(match["unit"])
    if unit not in UNITS:
        close = difflib.get_close_matches(unit, UNITS, n=1)
        hint = f"did you mean {match['number']} {close[0]}?" if close else f"write {_EXAMPLES}"
        raise UserError(f"duration {duration!r} has the unknown unit {match['unit']!r}; {hint}")
    return fractions.Fraction(match["number"].replace("_", "")), unit
