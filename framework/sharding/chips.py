"""Public figures of accelerators: peak speed, for utilisation, and memory and bandwidths, for planning."""

from typing import NamedTuple

from ...optimizers.plan import patterns

# Dense bfloat16 FLOP/s of one JAX device, from the vendors' data sheets. A device is a core on TPU v2 and v3,
# half a chip on TPU7x, and a chip on all others. Matched against the whole of `jax.Device.device_kind`.
_PEAKS = (
    (r"TPU v2", 22.5e12),
    (r"TPU v3", 61.5e12),
    (r"TPU v4", 275e12),
    (r"TPU v5( lite|e)", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6( lite|e)", 918e12),
    (r"TPU7x", 1153.5e12),  # of two devices a chip
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


def memory(device_kind: str) -> int | None:
    """Bytes that a program may use on a device of some kind; None where no figure is on file."""
    found = patterns.first_match(_MEMORY, device_kind)
    return None if found is None else int(found * 2**30)


# Short names of the kinds of devices that there are figures for.
KINDS = {
    "v2": "TPU v2",
    "v3": "TPU v3",
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
}


class Speeds(NamedTuple):
    """What a device can do at most.

    Attributes:
      flops: dense bfloat16 FLOP/s.
      memory: bytes/s of its high-bandwidth memory, read and written together.
      network: bytes/s that it can send to others of its slice or host, over all links together.
    """

    flops: float
    memory: float
    network: float


# Bytes/s of one JAX device: of memory, and of links in one direction, half of the published bidirectional figure. TPUs:
# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; v2 and v3: Jouppi et al. 2020 (doi 10.1145/3360307), halved for the
# two cores of a chip. GPUs: NVIDIA's data sheets, NVLink, which ends at the host.
_BANDWIDTHS = (
    (r"TPU v2", (350e9, 124e9)),
    (r"TPU v3", (450e9, 164e9)),
    (r"TPU v4", (1228e9, 300e9)),
    (r"TPU v5( lite|e)", (819e9, 200e9)),
    (r"TPU v5p?", (2765e9, 600e9)),
    (r"TPU v6( lite|e)", (1638e9, 400e9)),
    (r"TPU7x", (3690e9, 300e9)),
    (r".*V100.*", (900e9, 150e9)),
    (r".*A100.*", (2039e9, 300e9)),
    (r".*H100 PCIe.*", (2000e9, 300e9)),
    (r".*H200.*", (4800e9, 450e9)),
    (r".*(H100|GH200).*", (3350e9, 450e9)),
    (r".*B200.*", (8000e9, 900e9)),
    (r".*", None),
)


def speeds(device_kind: str) -> Speeds | None:
    """Of a kind of device; None where no public figures are on file."""
    peak, bandwidths = peak_flops(device_kind), patterns.first_match(_BANDWIDTHS, device_kind)
    return None if peak is None or bandwidths is None else Speeds(peak, *bandwidths)
