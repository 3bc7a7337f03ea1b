"""Look up public figures of accelerators: peak speed, for utilisation (MFU), and memory, for planning."""

from ...optimizers.plan import patterns

# Dense bfloat16 FLOP/s of one JAX device, from the vendors' data sheets. A device is a core on TPU v2 and v3, half a
# chip on TPU7x, and a chip on all others. Patterns match the whole of `jax.Device.device_kind`.
_PEAKS = (
    (r"TPU v2", 22.5e12),
    (r"TPU v3", 61.5e12),
    (r"TPU v4", 275e12),
    (r"TPU v5( lite|e)", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6( lite|e)", 918e12),
    (r"TPU7x", 1153.5e12),
    (r".*\bA100\b.*", 312e12),
    (r".*\bL40S\b.*", 362e12),
    (r".*\bH100 PCIe\b.*", 756e12),
    (r".*\b(H100|H200) NVL\b.*", 835e12),
    (r".*\b(H100|H200|GH200)\b.*", 989e12),
    (r".*\b(B200|B300)\b.*", 2250e12),
    (r".*\b(GB200|GB300)\b.*", 2500e12),
    (r".*\b(MI300X|MI325X)\b.*", 1307e12),
    (r".*", None),
)

# GiB of high-bandwidth memory that a program may use on one device, as libtpu 0.0.42 says when a program needs more. It
# compiles for v4 with two devices a chip.
_MEMORY = (
    (r"TPU v2", 7.48),
    (r"TPU v3", 15.48),
    (r"TPU v4", 15.25),
    (r"TPU v5( lite|e)", 15.75),
    (r"TPU v5p?", 95.74),
    (r"TPU v6( lite|e)", 31.25),
    (r"TPU7x", 94.75),
    (r".*", None),
)


def peak_flops(device_kind: str) -> float | None:
    """Return the peak bfloat16 FLOP/s of a kind of device, or None if it is not known (as for a CPU)."""
    return patterns.first_match(_PEAKS, device_kind)


def memory(device_kind: str) -> int | None:
    """Return the bytes that a program may use on a kind of device, or None if they are not known."""
    found = patterns.first_match(_MEMORY, device_kind)
    return None if found is None else int(found * 2**30)
