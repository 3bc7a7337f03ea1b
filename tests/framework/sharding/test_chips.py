"""Test public figures of chips."""

import pytest

from shampax.framework.sharding.chips import chip, memory, peak_flops


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A1000", None),
        ("Tesla V100-SXM2-16GB", 125e12),  # of float16
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA B300 SXM6 AC", 2250e12),
        ("NVIDIA GB300", 2500e12),
        ("AMD Instinct MI300X", 1307e12),
        ("AMD Instinct MI300A", 981e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
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


@pytest.mark.parametrize(
    "kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "NVIDIA H100 80GB HBM3", "NVIDIA B200"]
)
def test_speeds_are_in_the_right_unit(kind):
    """Fault: bits per second in place of bytes, or a figure in the place of another."""
    found = chip(kind)
    assert 100e12 < found.flops < 3e15
    assert found.flops / 40 < found.float32 < found.flops / 5
    assert 100 < found.flops / found.bandwidth < 700  # FLOPs per byte
    assert found.bandwidth > 3 * found.links > 3 * 8 * found.network
    assert found.memory > 15
