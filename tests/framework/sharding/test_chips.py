"""Test public figures of chips."""

import pytest

from shampax.framework.sharding.chips import memory, peak_flops


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A1000", None),
        ("Tesla V100-SXM2-16GB", None),  # no bfloat16
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("AMD Instinct MI300X", 1307e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    """Fault: a pattern also matches another chip."""
    assert peak_flops(kind) == peak


def test_memory_of_unknown_devices_is_unknown():
    """Fault: a plan for CPUs claims that it fits, or not."""
    assert memory("TPU v5 lite") == int(15.75 * 2**30)
    assert memory("cpu") is None
