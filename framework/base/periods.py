"""Things that happen every so many steps."""

import dataclasses
import sys


@dataclasses.dataclass(frozen=True)
class Period:
    """After steps `steps`, 2 `steps`, ...; never if `steps` is 0."""

    steps: int

    def due(self, step: int) -> bool:
        """Whether it happens after this step."""
        return self.steps > 0 and step > 0 and step % self.steps == 0

    def next(self, step: int) -> int:
        """The first step later than `step` after which it happens."""
        return (step // self.steps + 1) * self.steps if self.steps > 0 else sys.maxsize
