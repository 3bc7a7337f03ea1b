"""The toy data set that tells its shapes, and a task that needs more memory than there is."""

import dataclasses

import jax
import numpy as np
import toy


@dataclasses.dataclass(frozen=True)
class SpecifiedData(toy.ToyData):
    """Knows the shapes of its examples."""

    def spec(self):
        return {
            "tokens": jax.ShapeDtypeStruct((9,), np.int32),
            "weights": jax.ShapeDtypeStruct((8,), np.float32),
        }
