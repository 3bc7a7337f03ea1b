"""Test FLOPs and bytes of kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampax.models.kernels import costs


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


QUERY, KEY = array(2, 16, 2_048, 128), array(2, 8, 2_048, 128)
MASK, SUMS = array(1, 4, 4, dtype=jnp.int8), array(2, 512, 128, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("name", "results", "products"),
    [
        ("splash_mha_fwd_segmented", (SUMS, QUERY), 2),
        ("splash_mha_dq_segmented", (SUMS, QUERY), 3),
        ("splash_mha_dkv_segmented", (SUMS, KEY, KEY), 4),
        ("splash_mha_dkv_segmented", (SUMS, array(2, 4, 16, 2_048, 128), KEY, KEY), 5),
    ],
)
def test_splash(name, results, products):
    """Faults: a pass lacks a product; the skipped half counts; keys are read once though every block reads them."""
    flops, size = costs.cost(f"visits_0.6250/{name}", [MASK, MASK, QUERY, KEY, KEY], results)
    pairs = 2 * 16 * 2_048**2 * 0.625
    assert flops == 2 * products * pairs * 128
    written = sum(np.prod(x.shape) * x.dtype.itemsize for x in results)
    assert size == pytest.approx(written + 2 * 16 * 2_048 * 128 * 2 + 2 * pairs / 512 * 128 * 2)


def test_cudnn():
    """Fault: the backward pass counts as the forward one."""
    query, key = array(8, 2_048, 16, 128), array(8, 2_048, 8, 128)
    forward, _ = costs.cost("__cudnn$fmhaScaleBiasSoftmax visits_0.5", [query, key, key], [query])
    backward, _ = costs.cost("__cudnn$fmhaScaleBiasSoftmaxBackward visits_0.5", [query, key, key], [query])
    assert forward == 4 * 8 * 16 * 2_048**2 * 128 * 0.5
    assert backward == 2.5 * forward


def test_grouped_products():
    """Faults: rows without a group count; a kernel that fits no tile is read once; tiles of rows are read once."""
    ids, kernels = array(17, dtype=jnp.int32), array(4, 2_048, 5_632)
    rows, out = array(8_192, 2_048), array(8_192, 5_632)
    used = 8_192 // 2
    forward, size = costs.cost("filled_0.5/jvp(jit(gmm))/pallas_call", [ids, rows, kernels], [out])
    assert forward == 2 * used * 2_048 * 5_632
    # Tiles of 128 rows, 2,048 inputs and 1,408 outputs.
    assert size == 2 * (used * (4 * 2_048 + 5_632) + 4 * 2_048 * 5_632)
    of_rows, size = costs.cost("filled_0.5/transpose(jvp(jit(gmm)))/pallas_call", [ids, out, kernels], [rows])
    assert of_rows == forward
    # 1,408 of 5,632 inputs and 1,024 of 2,048 outputs; 32 tiles of rows and 3 that two groups share.
    assert size == 2 * (used * (2 * 5_632 + 2_048) + 35 * 2_048 * 5_632)
    of_kernels, size = costs.cost("filled_0.5/transpose(jvp(jit(tgmm)))/pallas_call", [ids, rows, out], [kernels])
    assert of_kernels == forward
    assert size == 2 * (used * (4 * 2_048 + 5_632) + 4 * 2_048 * 5_632)


def test_other_kernels_are_not_known():
    """Fault: the FLOPs of attention for another kernel."""
    assert costs.cost("tpu_custom_call gmm", [QUERY], [QUERY]) is None


@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 100), (True, 1), (False, 0)])
def test_visited_blocks(causal, window):
    """Fault: a block on the diagonal or at the edge of the window is not counted."""
    queries = np.concatenate([np.arange(96, 128), np.arange(400, 432)])  # an early and a late part
    slots = np.arange(512)
    sees = np.ones((64, 512), bool)
    if causal:
        sees = queries[:, None] >= slots
        if window:
            sees &= queries[:, None] - slots < window
    for size, keys in ((16, 32), (32, 16)):
        blocks = sees.reshape(64 // size, size, 512 // keys, keys).any(axis=(1, 3))
        assert costs.visited(queries, size, keys, 512, causal=causal, window=window) == blocks.mean()
