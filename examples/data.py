"""A data set: noisy waves of four frequencies. Every example is a function of its number.

    shampax train --config=examples/config.py --workdir=runs/example --config.data.rows=2000

`shampax/framework/dataset.py` is the contract; docs/data.md has readers for text, TSV and TensorFlow data sets.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

LENGTH, CLASSES = 64, 4


@dataclasses.dataclass(frozen=True)
class WavesData:
    """The data set. Each field is a knob of `config.data`."""

    rows: int = 1_000  # number of training examples
    heldout_rows: int = 100  # number of held-out examples

    @property
    def tokens_per_example(self) -> int:
        """Count one wave as one token in the throughput."""
        return 1

    def prepare(self, cache: Path) -> None:
        """Write nothing: an example takes no longer to compute than to read."""

    def examples(self, split: str, cache: Path) -> "Waves":
        """Return random access to the examples of a split, "train" or "heldout"."""
        return Waves(self.rows, seed=0) if split == "train" else Waves(self.heldout_rows, seed=1)

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes and types of an example; optional, but `shampax plan` needs it."""
        return {
            "wave": jax.ShapeDtypeStruct((LENGTH, 1), np.float32),
            "label": jax.ShapeDtypeStruct((), np.int32),
            "weight": jax.ShapeDtypeStruct((), np.float32),
        }


class Waves:
    """Examples 0 ... length - 1 as dicts of arrays of fixed shapes, without a batch dimension."""

    def __init__(self, length: int, seed: int):
        self._length, self._seed = length, seed

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((self._seed, index))
        label = random.integers(CLASSES)
        turns = np.linspace(0, 2 + label, LENGTH) + random.uniform()
        wave = np.sin(2 * np.pi * turns) + random.normal(0, 0.3, LENGTH)
        # The trainer fills the last held-out batch with examples that are all zeros. Their weight is 0.
        return {
            "wave": wave[:, None].astype(np.float32),
            "label": np.asarray(label, np.int32),
            "weight": np.asarray(1, np.float32),
        }
