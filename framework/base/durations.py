"""Convert durations ("600 steps", "2 epochs", "1e6 examples", "5e6 tokens", "10%") to steps, and repeat after them."""

import dataclasses
import fractions
import math
import re
import sys
import time
from collections.abc import Callable

from .errors import UserError

UNITS = ("steps", "epochs", "examples", "tokens", "%")
# Two digits of exponent at most: exact arithmetic on "1e999999999" would fill the memory.
_FORM = re.compile(r"\s*(?P<number>[0-9][0-9_]*(\.[0-9]+)?([eE]\+?[0-9]{1,2})?)\s*(?P<unit>%|[A-Za-z]+|)\s*")
_MOST_STEPS = 2**31 - 1  # the step is an int32 on devices
_COUNTS = "600 steps, 2 epochs, 1e6 examples or 5e6 tokens"
_EXAMPLES = f"{_COUNTS}, or 10% of the run"


@dataclasses.dataclass(frozen=True)
class Units:
    """Convert durations of one run to steps.

    Attributes:
      batch_size: examples per step, over all devices and micro-batches.
      examples_per_epoch: returns the examples of the training set; called for epochs only.
      tokens_per_example: tokens of one example; 1 where examples are not text.
      total_steps: steps of the whole run; None while they are not known, when a percentage is an error.
    """

    batch_size: int
    examples_per_epoch: Callable[[], int]
    tokens_per_example: int
    total_steps: int | None = None


def to_steps(duration: str | int, units: Units) -> int:
    """Return the number of steps of a duration, rounded up. A plain number counts steps.

    The arithmetic is exact: "0.1 epochs" of 1,000 examples is 100 examples, although 0.1 has no exact binary form.

    Raises:
      UserError: not a duration; a fraction of a step; more steps than int32 counts; a percentage while the length of
        the run is not known.
    """
    number, unit = parse(duration, whole_run=units.total_steps is None)
    epoch = units.examples_per_epoch() if unit == "epochs" else 0
    steps = {
        "steps": number,
        "epochs": number * epoch / units.batch_size,
        "examples": number / units.batch_size,
        "tokens": number / units.tokens_per_example / units.batch_size,
        "%": number * (units.total_steps or 0) / 100,
    }[unit]
    if steps > _MOST_STEPS:
        raise UserError(f"{duration!r}: is {float(steps):.3g} steps. Use at most {_MOST_STEPS} steps.")
    return math.ceil(steps)


def is_duration(text: str) -> bool:
    """Return whether a text is a number followed by one of the units."""
    match = _FORM.fullmatch(text)
    return match is not None and _plural(match["unit"]) in UNITS


def _plural(unit: str) -> str:
    return unit if unit.endswith(("s", "%")) else f"{unit or 'step'}s"


def parse(duration: str | int, *, whole_run: bool = False) -> tuple[fractions.Fraction, str]:
    """Return the number and the unit of a duration.

    Args:
      duration: a text with a number and a unit, or a number of steps.
      whole_run: whether it is the length of the run, which cannot be a percentage.

    Raises:
      UserError: as `to_steps`.
    """
    match = _FORM.fullmatch(str(duration))
    if match is None:
        raise UserError(f"{duration!r}: not a duration. Write a number and a unit, such as {_EXAMPLES}.")
    unit, number = _plural(match["unit"]), fractions.Fraction(match["number"].replace("_", ""))
    if unit not in UNITS:
        raise UserError(f"{duration!r}: unknown unit {match['unit']!r}. Write {_EXAMPLES}.")
    if unit == "%" and whole_run:
        raise UserError(f"{duration!r}: a percentage cannot set the length of the run. Use {_COUNTS}.")
    if unit == "steps" and number.denominator != 1:
        raise UserError(f"{duration!r}: a duration in steps must be whole. Use {math.ceil(number)} steps.")
    if unit == "steps" and number > _MOST_STEPS:
        raise UserError(f"{duration!r}: too many steps. Use at most {_MOST_STEPS} steps.")
    return number, unit


@dataclasses.dataclass(frozen=True)
class Period:
    """Repeat an action after steps `steps`, 2 `steps`, ...; never if `steps` is 0."""

    steps: int

    def due(self, step: int) -> bool:
        """Return whether the action happens after this step."""
        return self.steps > 0 and step > 0 and step % self.steps == 0

    def next(self, step: int) -> int:
        """Return the first step later than `step` after which the action happens."""
        return (step // self.steps + 1) * self.steps if self.steps > 0 else sys.maxsize


class Countdown:
    """Seconds since a step, and a guess of the step at which they are over.

    Args:
      seconds: how many; 0 never ends.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._began, self._step = time.monotonic(), 0

    def start(self, step: int) -> None:
        """Begin to count, after this step."""
        self._began, self._step = time.monotonic(), step

    @property
    def over(self) -> bool:
        """Whether the seconds are over."""
        return 0 < self.seconds <= time.monotonic() - self._began

    def next(self, step: int) -> int:
        """Return a step to look again: half of the way at the pace since the beginning, because the pace may change."""
        passed = time.monotonic() - self._began
        left = (self.seconds - passed) / 2
        return step + max(1, int(left * (step - self._step) / passed) if passed > 0 else 1)
