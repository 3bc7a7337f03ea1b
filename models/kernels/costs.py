"""FLOPs and bytes of kernels, for planning: the compiler knows neither. Tiles of the kernels for groups of rows."""

import math
import re
from collections.abc import Sequence

import jax
import numpy as np

# Products of [T, D] and [S, D] in each pass, of 2 T S D FLOPs.
_TYPES = ("bfloat16", "float16", "float32")
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "dkv_fused": 5}
# Most rows, inputs and outputs of a tile of a grouped product: 40 MB of vector memory, of which a TPU v5e has 128. A
# kernel whose inputs fit one tile is read once for all rows of its group.
_TILE = (512, 2_048, 1_536)
_LEAST_TILE = 128


def rows_at_once(rows: int, groups: int, least: int, most: int) -> int:
    """Return how many rows of a grouped product a tile or block has: a power of two.

    Each group ends inside a block. With R / (10 G) rows or less, the rest of these blocks is at most R / 10.
    """
    return max(least, min(most, 2 ** int(math.log2(max(1, rows / (10 * groups))))))


def tile_of(rows: int, groups: int, inputs: int, outputs: int) -> tuple[int, int, int]:
    """Return rows, inputs and outputs of a tile of a grouped product. Sides divide the sizes if multiples of 128 do."""

    def side(size: int, most: int) -> int:
        return max((side for side in range(128, most + 1, 128) if size % side == 0), default=min(size, most))

    return rows_at_once(rows, groups, _LEAST_TILE, _TILE[0]), side(inputs, _TILE[1]), side(outputs, _TILE[2])


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
    """Return FLOPs and bytes of a call of splash attention, of cuDNN's or of megablox, None for other kernels.

    A scope "visits_0.625" in the name tells which share of the pairs of blocks is computed, by default those of causal
    attention.

    A scope "filled_0.8" tells which share of the rows of a grouped product belongs to a group.

    For each pair splash attention reads a block of keys and one of values, or of queries and of their gradient. cuDNN
    reads everything once.
    """

    def visits(keys: int, block: int) -> float:
        share = re.search(r"visits_([\d.]+)", name)
        return float(share[1]) if share else (1 + block / keys) / 2

    arrays = [each for each in operands if each.dtype in _TYPES and len(each.shape) >= 3]
    if found := re.search(r"splash_m[hq]a_(fwd|dq|dkv)", name):
        query, (*_, keys, _), (*_, of_values) = (each.shape for each in arrays[:3])
        *rows, length, of_keys = query
        width = (of_keys + of_values) / 2  # about half of the products, and of what is read, have either width
        # The fused pass returns one gradient of the queries for each block of keys.
        fused = any(len(each.shape) == len(query) + 1 for each in results)
        products = _PRODUCTS[found[1] + "_fused" * fused]
        block = results[0].shape[-2]  # of what is summed: queries, or keys in "dkv"
        share = visits(keys, block)
        outer, inner = (keys, length) if found[1] == "dkv" else (length, keys)
        read = 2 * math.prod(rows) * max(1, outer // block) * inner * share * width * arrays[0].dtype.itemsize
        pairs = math.prod(rows) * length * keys * share
        return 2.0 * products * pairs * width, read + sum(_bytes(each) for each in (arrays[0], *results))
    if found := re.search(r"jit\((t?)gmm\)", name):
        floats = [each for each in operands if each.dtype in _TYPES]
        return _grouped(name, floats, results[0], of_kernels=bool(found[1]))
    if "__cudnn$fmha" in name:
        # [B, T, H, D] and [B, S, K, D]
        query, keys = arrays[0].shape, arrays[1].shape[1]
        products = _PRODUCTS["dkv_fused" if "Backward" in name else "fwd"]
        return 2.0 * products * math.prod(query) * keys * visits(keys, 128), sum(map(_bytes, (*operands, *results)))
    return None


def _grouped(
    name: str, operands: Sequence[jax.ShapeDtypeStruct], result: jax.ShapeDtypeStruct, of_kernels: bool
) -> tuple[float, float]:
    """Return FLOPs and bytes of a product of groups of rows with kernels or, for the gradient of these, with rows."""
    rows, inputs = operands[0].shape
    groups, outputs = (
        (result if of_kernels else operands[1]).shape[0],
        (operands[1] if of_kernels else result).shape[-1],
    )
    share = re.search(r"filled_([\d.]+)", name)
    filled = rows * (float(share[1]) if share else 1.0)
    tile, tile_inputs, tile_outputs = tile_of(rows, groups, inputs, outputs)
    wide, long = math.ceil(outputs / tile_outputs), math.ceil(inputs / tile_inputs)
    if of_kernels:
        read = filled * (inputs * wide + outputs * long) + groups * inputs * outputs
    else:
        times = groups if long == 1 else math.ceil(filled / tile) + groups - 1
        read = filled * (inputs * wide + outputs) + times * inputs * outputs
    return 2.0 * filled * inputs * outputs, read * operands[0].dtype.itemsize


def _bytes(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.shape) * array.dtype.itemsize
