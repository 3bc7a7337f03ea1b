import jax
import jax.numpy as jnp
import numpy as np

from shampax.optimizers import ShampooOptions
from shampax.optimizers.state import Layout


def layout(shapes, names):
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return Layout.of(params, ShampooOptions(block_size=8), None, names, None)


def test_layers_are_entries_of_the_first_stacked_axis():
    """Faults: a block counts for another layer; experts hide layers; NaN of blocks without roots spoils a layer."""
    shapes = {"a": (3, 2, 16, 8), "b": (8, 8)}
    made = layout(shapes, {"a": ("layers", "experts", "embed", "mlp"), "b": ("embed", "mlp")})
    (bucket,) = made.plan.buckets
    assert bucket.blocks == 3 * 2 * 2 + 1
    values = np.zeros((5, bucket.slots.size), np.float32)
    for block, slot in enumerate(bucket.slot_of_block):
        values[:4, slot] = block
        values[4, slot] = 1
    values[:4, bucket.slot_of_block[[4, 8, 9, 10, 11]]] = np.nan
    names, metrics = made.diagnostics_by_layer({bucket.name: values})
    assert names == ["a 0", "a 1", "a 2", "b"]
    np.testing.assert_array_equal(metrics["condition"], [3, 7, np.nan, 12])
    np.testing.assert_array_equal(metrics["staleness"], [1.5, 6, np.nan, 12])
    np.testing.assert_array_equal(metrics["fallbacks"], [4, 4, 4, 1])


def test_a_parameter_of_very_many_matrices_is_one_layer():
    made = layout({"a": (200, 8, 8)}, {"a": ("layers", "embed", "mlp")})
    (bucket,) = made.plan.buckets
    names, metrics = made.diagnostics_by_layer({bucket.name: np.ones((5, bucket.slots.size))})
    assert names == ["a"] and metrics["fallbacks"] == [200]
