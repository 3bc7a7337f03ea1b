"""Generate clicks of a hidden teacher, to test whether a model learns.

An example is a function of the seed and its index. Categories follow a power law, integers are log-normal, some fields
are empty. The teacher's logit is a sum of a number for each category, a slope times the logarithm of each integer, and
products of hidden vectors of neighbouring categories.
"""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np

from shampax.framework.data import clicks
from shampax.framework.data.click_lines import CATEGORIES, INTEGERS, MISSING, row_type
from shampax.framework.dataset import Split

_HIDDEN = 4  # length of the teacher's vectors
_EMPTY = 0.05  # share of the integers
_SHARES = 0.6, 0.3, 0.1  # shares of the logit's variance: categories, integers, products


@dataclasses.dataclass(frozen=True)
class SyntheticClicks:
    """Clicks of a teacher, computed when they are read."""

    examples_in_train: int = 1_000_000
    examples_in_heldout: int = 10_000
    values: int = 1_000  # distinct values of each category
    signal: float = 1.0  # approximate standard deviation of the teacher's logits; AUC rises with it
    seed: int = 0  # seed of the teacher and of the examples

    def __post_init__(self):
        for name in ("examples_in_train", "examples_in_heldout", "values"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be at least 1")
        if self.signal < 0:
            raise ValueError(f"data.signal={self.signal}: must be at least 0")

    @property
    def tokens_per_example(self) -> int:
        """Return 1."""
        return 1

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `ClickData.spec`."""
        return clicks.ClickData().spec()

    def prepare(self, cache: Path) -> None:
        """Do nothing."""

    def examples(self, split: Split, cache: Path) -> "TaughtClicks":
        """Return random access to the examples of a split."""
        return TaughtClicks(self, split)

    def fingerprint(self, cache: Path) -> str:
        """Return the fields, which determine everything."""
        return repr(self)


class TaughtClicks:
    """The examples of a split."""

    def __init__(self, data: SyntheticClicks, split: Split):
        self._data, self._split = data, split
        random = np.random.default_rng([data.seed, 0])
        self._values = random.normal(size=(CATEGORIES, data.values)) * math.sqrt(_SHARES[0] / CATEGORIES)
        self._slopes = random.normal(size=INTEGERS) * math.sqrt(_SHARES[1] / INTEGERS)
        length = (_SHARES[2] / CATEGORIES / _HIDDEN) ** 0.25
        self._vectors = random.normal(size=(CATEGORIES, data.values, _HIDDEN)) * length
        # As in Criteo's data, a category is a 32-bit hash of its value.
        self._hashes = random.integers(1, 2**32, (CATEGORIES, data.values), dtype=np.uint32)

    def __len__(self) -> int:
        return self._data.examples_in_train if self._split == "train" else self._data.examples_in_heldout

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.taught(index)[0]

    def taught(self, index: int) -> tuple[dict[str, np.ndarray], float]:
        """Return an example and its probability of a click."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        random = np.random.default_rng([self._data.seed, 1 if self._split == "train" else 2, index])
        # An exponent of a uniform number makes value v about as frequent as 1 / v.
        values = (self._data.values ** random.random(CATEGORIES)).astype(np.int64) - 1
        logarithms = random.normal(2, 1, INTEGERS)
        integers = np.maximum(np.expm1(logarithms), -2).astype(np.int32)
        every = np.arange(CATEGORIES)
        vectors = self._vectors[every, values]
        # The teacher gets the same integers as a model.
        seen = np.log1p(np.maximum(integers, 0))
        empty = random.random(INTEGERS) < _EMPTY
        logit = self._values[every, values].sum() + self._slopes @ np.where(empty, 0, seen - 2)
        logit += (vectors * np.roll(vectors, 1, axis=0)).sum()
        chance = 1 / (1 + math.exp(-self._data.signal * logit))
        label = random.random() < chance
        row = np.array([(label, np.where(empty, MISSING, integers), self._hashes[every, values])], row_type(1))
        return clicks.examples(row)[0], chance
