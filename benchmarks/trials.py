"""Describe a run of a comparison, and search the settings of one optimizer in stages."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .contestants import FIRST

# Settings of every search: learning rates are factors of the contestant's own centre.
LADDER, LONGEST = (0.5, 1.0, 2.0), 5
CHANGES: tuple[dict[str, Any], ...] = (
    {"nesterov": False},
    {"momentum": 0.9},
    {"momentum": 0.7},
    {"embeddings": 1.0},
    {"embeddings": 2.0},
    {"embeddings": 4.0},
    {"schedule": "linear"},
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run: a contestant with settings and a seed.

    The settings are its learning rate ("rate"), its "momentum" and "nesterov", the "schedule" of the rate if it is not
    the config's, the factor of the rate of "embeddings" if it is not its own, and fields of its options.
    """

    variant: str
    settings: tuple[tuple[str, Any], ...]
    seed: int

    @classmethod
    def of(cls, contestant: str, seed: int = 0, /, **settings: Any) -> "Trial":
        """Return a trial with settings in a fixed order."""
        return cls(contestant, tuple(sorted(settings.items())), seed)

    @property
    def name(self) -> str:
        """Name of its file."""
        return "-".join([self.variant, *(f"{key}={value}" for key, value in self.settings), f"seed={self.seed}"])

    def but(self, seed: int | None = None, /, **changes: Any) -> "Trial":
        """Return this trial with another seed or other settings."""
        return Trial.of(self.variant, self.seed if seed is None else seed, **(dict(self.settings) | changes))


def search(
    contestant: str,
    centre: float,
    loss_of: Callable[[Trial], float],
    seeds: Sequence[int],
    changes: Sequence[Mapping[str, Any]] = CHANGES,
    first: Mapping[str, Any] = FIRST,
) -> Trial:
    """Return the best trial of a contestant under the first seed; run it with the other seeds, too.

    First the learning rates centre x (1/2, 1, 2), and while the best is at the end of this ladder, a further one
    beyond, up to 5 rates. Then, from the best, each change in turn is kept if the loss is lower.

    Args:
      contestant: its name.
      centre: learning rate in the middle of the ladder.
      loss_of: trains a trial and returns its final held-out loss, NaN or infinite if it diverged.
      seeds: the first is used for the search.
      changes: of settings.
      first: settings other than the rate with which the search starts.
    """

    def loss(trial: Trial) -> float:
        found = loss_of(trial)
        return found if math.isfinite(found) else math.inf

    start = Trial.of(contestant, seeds[0], rate=centre, **first)
    rates = {factor: loss(start.but(rate=centre * factor)) for factor in LADDER}
    while len(rates) < LONGEST and (best := min(rates, key=rates.__getitem__)) in (min(rates), max(rates)):
        factor = best * 2 if best == max(rates) else best / 2
        rates[factor] = loss(start.but(rate=centre * factor))
    best = min(rates, key=rates.__getitem__)
    lowest, chosen = rates[best], start.but(rate=centre * best)
    for change in changes:
        if (found := loss(chosen.but(**change))) < lowest:
            lowest, chosen = found, chosen.but(**change)
    for seed in seeds[1:]:
        loss_of(chosen.but(seed))
    return chosen
