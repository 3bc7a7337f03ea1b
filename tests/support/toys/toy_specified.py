"""The toy data set with `spec`, and a task that needs more memory than a device has."""

import dataclasses

import jax
import numpy as np
import toy


@dataclasses.dataclass(frozen=True)
class SpecifiedData(toy.ToyData):
    """The toy data set with `spec`."""

    def spec(self):
        return {
            "tokens": jax.ShapeDtypeStruct((9,), np.int32),
            "weights": jax.ShapeDtypeStruct((8,), np.float32),
        }
