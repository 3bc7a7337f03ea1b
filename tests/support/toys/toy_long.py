"""The toy's data with rows of 17 tokens."""

import dataclasses

import numpy as np
import toy


@dataclasses.dataclass(frozen=True)
class LongData(toy.ToyData):
    """Rows of two of the toy's rows."""

    def examples(self, split, cache):
        source = super().examples(split, cache)
        return [{"tokens": np.tile(source[i]["tokens"], 2)[:17], "weights": np.ones(16, np.float32)} for i in range(4)]
