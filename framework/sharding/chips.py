"""Look up public figures of accelerators: peaks for utilisation (MFU), memory and speeds for planning."""

from typing import NamedTuple

from ...optimizers.plan import patterns


class Chip(NamedTuple):
    """Figures of one JAX device. It is a core on TPU v2 and v3, half a chip on TPU7x, and a chip on all others.

    Attributes:
      flops: dense bfloat16 FLOP/s.
      float32: FLOP/s of products in full float32: on a TPU six bfloat16 passes, on a GPU outside its tensor cores.
      bandwidth: bytes/s of its main memory.
      links: bytes/s that it can send inside its slice (ICI, all links of a chip together) or node.
      network: bytes/s that it can send to another slice or node: its share of the host's network cards.
      memory: GiB that a program may use.
    """

    flops: float
    float32: float
    bandwidth: float
    links: float
    network: float
    memory: float


def _tpu(flops: float, bandwidth: float, links: float, network: float, memory: float) -> Chip:
    return Chip(flops * 1e12, flops * 1e12 / 6, bandwidth * 1e9, links * 1e9, network * 1e9, memory)


def _gpu(flops: float, float32: float, bandwidth: float, links: float, network: float, memory: float) -> Chip:
    return Chip(flops * 1e12, float32 * 1e12, bandwidth * 1e9, links * 1e9, network * 1e9, memory)


# Patterns match the whole of `jax.Device.device_kind`; the first match wins. Sources: for TPUs the pages of the
# versions at docs.cloud.google.com/tpu/docs, with memory as libtpu 0.0.42 says when a program needs more; it compiles
# for v4 with two devices a chip. Network per chip: v5e 25 Gbit/s, v5p 50, v6e and TPU7x 100; v2 to v4 as hosts with 100
# or 200 Gbit/s. For GPUs the vendors' data sheets, without sparsity. Links count one direction. Between nodes, each GPU
# has the network card of the vendor's reference server. What JAX leaves free (XLA_PYTHON_CLIENT_MEM_FRACTION) counts as
# memory.
_CHIPS: tuple[tuple[str, Chip | None], ...] = (
    (r"TPU v2", _tpu(22.5, 350, 124, 3.1, 7.48)),
    (r"TPU v3", _tpu(61.5, 450, 164, 3.1, 15.48)),
    (r"TPU v4", _tpu(275, 1228, 300, 6.25, 15.25)),
    (r"TPU v5( lite|e)", _tpu(197, 819, 200, 3.125, 15.75)),
    (r"TPU v5p?", _tpu(459, 2765, 600, 6.25, 95.74)),
    (r"TPU v6( lite|e)", _tpu(918, 1638, 400, 12.5, 31.25)),
    (r"TPU7x", _tpu(1153.5, 3690, 600, 6.25, 94.75)),
    # V100 multiplies no bfloat16. Its peak is that of float16, the fastest type that it can train in.
    (r".*\bV100\b.*32GB.*", _gpu(125, 15.7, 900, 150, 12.5, 31.7)),
    (r".*\bV100\b.*", _gpu(125, 15.7, 900, 150, 12.5, 15.8)),
    (r".*\bA100\b.*80GB.*", _gpu(312, 19.5, 2039, 300, 25, 79.2)),
    (r".*\bA100\b.*", _gpu(312, 19.5, 1555, 300, 25, 39.4)),
    (r".*\bL40S\b.*", _gpu(362, 91.6, 864, 32, 25, 44.5)),
    (r".*\bH100 PCIe\b.*", _gpu(756, 51, 2000, 64, 50, 79.2)),
    (r".*\bH100 NVL\b.*", _gpu(835, 60, 3900, 300, 50, 93.1)),
    (r".*\bH200 NVL\b.*", _gpu(835, 60, 4800, 450, 50, 139.8)),
    (r".*\bGH200\b.*", _gpu(989, 67, 4000, 450, 50, 94.5)),
    (r".*\bH200\b.*", _gpu(989, 67, 4800, 450, 50, 139.8)),
    (r".*\bH100\b.*", _gpu(989, 67, 3350, 450, 50, 79.1)),
    (r".*\bGB300\b.*", _gpu(2500, 80, 8000, 900, 100, 276)),
    (r".*\bGB200\b.*", _gpu(2500, 80, 8000, 900, 50, 184)),
    (r".*\bB300\b.*", _gpu(2250, 75, 8000, 900, 100, 268)),
    (r".*\bB200\b.*", _gpu(2250, 75, 7700, 900, 50, 178)),
    (r".*\bMI325X\b.*", _gpu(1307, 163, 6000, 448, 50, 255)),
    (r".*\bMI300X\b.*", _gpu(1307, 163, 5300, 448, 50, 191)),
    (r".*\bMI300A\b.*", _gpu(981, 123, 5300, 384, 25, 120)),
    (r".*", None),
)


def chip(device_kind: str) -> Chip | None:
    """Return the figures of a kind of device, or None if they are not known (as for a CPU)."""
    return patterns.first_match(_CHIPS, device_kind)


def peak_flops(device_kind: str) -> float | None:
    """Return the peak bfloat16 FLOP/s of a kind of device, or None if it is not known."""
    found = chip(device_kind)
    return found and found.flops


def memory(device_kind: str) -> int | None:
    """Return the bytes that a program may use on a kind of device, or None if they are not known."""
    found = chip(device_kind)
    return found and int(found.memory * 2**30)
