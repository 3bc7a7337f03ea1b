"""Peak speed of accelerators, for utilisation."""

from ..optimizers import patterns

# Dense bfloat16 FLOP/s of one JAX device, from the vendors' data sheets. A device is a core on TPU v2 and v3,
# and a chip on all others. Matched against the whole of `jax.Device.device_kind`.
_PEAKS = (
    (r"TPU v2", 22.5e12),
    (r"TPU v3", 61.5e12),
    (r"TPU v4", 275e12),
    (r"TPU v5( lite|e)", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6( lite|e)", 918e12),
    (r".*V100.*", 125e12),
    (r".*A100.*", 312e12),
    (r".*H100 PCIe.*", 756e12),
    (r".*(H100|H200|GH200).*", 989e12),
    (r".*B200.*", 2250e12),
    (r".*", None),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a kind of device; None where no public figure is on file (CPUs, say)."""
    return patterns.first_match(_PEAKS, device_kind)
