"""FLOPs and bytes of the attention kernels, for planning: the compiler knows neither."""

import math
import re
from collections.abc import Sequence

import jax
import numpy as np

# Products of [T, D] and [S, D] in each pass, of 2 T S D FLOPs.
_TYPES = ("bfloat16", "float16", "float32")
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "dkv_fused": 5}


def visited(queries: np.ndarray, size: int, key_size: int, keys: int, *, causal: bool = True, window: int = 0) -> float:
    """Return the share of the pairs of blocks that a kernel visits: those in which some query sees some key.

    Args:
      queries: positions of the queries of a device, [T].
      size: number of queries of a block.
      key_size: number of keys of a block.
      keys: number S of keys.
      causal: whether a query sees only the positions up to its own.
      window: number of the last positions that a causal query sees; 0 for all.
    """
    if not causal:
        return 1.0
    blocks = queries.reshape(-1, size)
    starts = np.arange(0, keys, key_size)
    seen = starts <= blocks.max(axis=1)[:, None]
    if window:
        seen &= starts + key_size > blocks.min(axis=1)[:, None] - window + 1
    return float(seen.mean())


def cost(
    name: str, operands: Sequence[jax.ShapeDtypeStruct], results: Sequence[jax.ShapeDtypeStruct]
) -> tuple[float, float] | None:
    """Return FLOPs and bytes of a call of splash attention or of cuDNN's, None for other kernels.

    A scope "visits_0.625" in the name tells which share of the pairs of blocks is computed, by default those of causal
    attention.

    For each pair splash attention reads a block of keys and one of values, or of queries and of their gradient. cuDNN
    reads everything once.
    """

    def visits(keys: int, block: int) -> float:
        share = re.search(r"visits_([\d.]+)", name)
        return float(share[1]) if share else (1 + block / keys) / 2

    arrays = [each for each in operands if each.dtype in _TYPES and len(each.shape) >= 3]
    if found := re.search(r"splash_m[hq]a_(fwd|dq|dkv)", name):
        (*rows, length, width), (*_, keys, _) = query, _ = arrays[0].shape, arrays[1].shape
        # The fused pass returns one gradient of the queries for each block of keys.
        fused = any(len(each.shape) == len(query) + 1 for each in results)
        products = _PRODUCTS[found[1] + "_fused" * fused]
        block = results[0].shape[-2]  # of what is summed: queries, or keys in "dkv"
        share = visits(keys, block)
        outer, inner = (keys, length) if found[1] == "dkv" else (length, keys)
        read = 2 * math.prod(rows) * max(1, outer // block) * inner * share * width * arrays[0].dtype.itemsize
        pairs = math.prod(rows) * length * keys * share
        return 2.0 * products * pairs * width, read + sum(_bytes(each) for each in (arrays[0], *results))
    if "__cudnn$fmha" in name:
        # [B, T, H, D] and [B, S, K, D]
        query, keys = arrays[0].shape, arrays[1].shape[1]
        products = _PRODUCTS["dkv_fused" if "Backward" in name else "fwd"]
        return 2.0 * products * math.prod(query) * keys * visits(keys, 128), sum(map(_bytes, (*operands, *results)))
    return None


def _bytes(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.shape) * array.dtype.itemsize
