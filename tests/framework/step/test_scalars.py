import jax
import jax.numpy as jnp
import numpy as np

from shampax.framework.step.scalars import Scalars


def test_scalars_pass_through_a_compiled_function_with_all_their_bits():
    """Faults: a count above 2**24 is rounded; a NaN or a tiny number becomes another; one transfer for each scalar."""
    values = {
        "loss": np.float32(0.1),
        "nan": np.float32("nan"),
        "tiny": np.float32(1e-38),
        "half": jnp.bfloat16(1.5),
        "skipped": np.int32(2**24 + 1),
        "negative": np.int32(-3),
        "clipped": np.bool_(True),
    }
    found = jax.jit(Scalars.pack)(values)
    assert [leaf.shape for leaf in jax.tree.leaves(found)] == [(len(values),)]
    assert {*found} == {*values}
    for name, value in values.items():
        np.testing.assert_array_equal(found[name], np.asarray(value, found[name].dtype))
    assert found["skipped"].dtype == np.int32 and found["loss"].dtype == np.float32
    assert dict(jax.jit(Scalars.pack)({})) == {}
