import math

import jax
import numpy as np
import pytest

from shampax.optimizers.linalg.symmetric import pack, packed_shape, unpack


@pytest.mark.parametrize("r", [1, 2, 3, 8, 11, 64, 75, 128, 256])
@pytest.mark.parametrize("compiled", [False, True], ids=["NumPy", "JAX"])
def test_a_symmetric_matrix_survives_packing_to_the_last_bit(r, compiled):
    """Faults: an element is lost or moves; odd sides fail; NumPy and JAX differ."""
    x = np.random.default_rng(r).normal(size=(3, r, r)).astype(np.float32)
    x = np.tril(x) + np.swapaxes(np.tril(x, -1), -2, -1)
    there, back = (jax.jit(pack), jax.jit(unpack, static_argnums=1)) if compiled else (pack, unpack)
    packed = there(x)
    assert packed.shape == (3, *packed_shape(r))
    np.testing.assert_array_equal(packed, pack(x))
    np.testing.assert_array_equal(back(packed, r), x)


def test_half_the_memory():
    """Faults: both triangles are stored; the shape is one that TPUs pad to tiles of 8 x 128."""
    rows, columns = packed_shape(1024)
    assert rows * columns == 1024 * 1025 // 2
    for r, share in ((64, 0.4), (128, 0.57), (256, 0.52)):
        rows, columns = (math.ceil(n / tile) * tile for n, tile in zip(packed_shape(r), (8, 128), strict=True))
        assert rows * columns <= share * r * max(r, 128)
