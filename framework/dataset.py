"""The contract between the trainer and a data set: what the config's `data` section names, a frozen dataclass.

Beyond `Data`, a data set may have `fingerprint(cache)`, `augment(example, rng)`, `decoder(cache)` and `spec()`; the
functions here of these names give the answer for those that have none.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from .data.pipeline import Augment, Example, Source
from .data.splits import Split

Decoder = Callable[[np.ndarray], str]


class Data(Protocol):
    """What a data set must offer to be trained on."""

    @property
    def tokens_per_example(self) -> int:
        """Tokens (or what else is counted) that an example trains on."""
        ...

    def prepare(self, cache: Path) -> None:
        """Put into `cache`, the run's own folder, what `examples` needs; one process calls it, before any reads.

        Raises:
          UserError: the data cannot be used.
        """
        ...

    def examples(self, split: Split, cache: Path) -> Source:
        """Random access to the examples of a split."""
        ...


@runtime_checkable
class _Fingerprinted(Protocol):
    def fingerprint(self, cache: Path) -> str: ...


@runtime_checkable
class _Augments(Protocol):
    def augment(self, example: Example, rng: np.random.Generator) -> Example: ...


@runtime_checkable
class _Decodes(Protocol):
    def decoder(self, cache: Path) -> Decoder: ...


@runtime_checkable
class _Specified(Protocol):
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]: ...


def fingerprint(data: Data, cache: Path) -> str:
    """Text that differs where the examples do, and not where they only lie elsewhere or were made anew.

    A run that resumes can tell by it whether its data are still the same. "" for a data set that does not say.

    Args:
      data: after `prepare`.
      cache: what it was prepared in.
    """
    return data.fingerprint(cache) if isinstance(data, _Fingerprinted) else ""


def augment(data: Data) -> Augment | None:
    """What makes of a training example, and of random numbers of its own, that which is trained on.

    The numbers are a function of the seed and of the example's place in the run (step and row), on any mesh. Without
    it the examples of `train` are trained on as they are. Those of `heldout` always are judged as they are, and must
    have the shapes that it gives.
    """
    return data.augment if isinstance(data, _Augments) else None


def decoder(data: Data, cache: Path) -> Decoder | None:
    """What turns the numbers of an example into the text they stand for; None for data that are no text."""
    return data.decoder(cache) if isinstance(data, _Decodes) else None


def spec(data: Data) -> dict[str, jax.ShapeDtypeStruct] | None:
    """Shapes and types of one example as it is trained on, known without reading any; None where it does not say."""
    return data.spec() if isinstance(data, _Specified) else None
