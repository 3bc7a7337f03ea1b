"""Products of groups of rows, each group with a kernel of its own: of few rows for each of many experts.

On TPUs this is JAX's megablox kernel, which visits only tiles that hold rows. Elsewhere XLA would multiply all rows by
all kernels (`jax.lax.ragged_dot`), so a loop over blocks of rows takes its place. Shapes in names: R rows, G groups, K
inputs, N outputs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu import megablox

from .costs import rows_at_once, tile_of

_LEAST_BLOCK, _MOST_BLOCK = 8, 512


def grouped_product(rows_RxK: jax.Array, kernels_GxKxN: jax.Array, sizes_G: jax.Array, platform: str) -> jax.Array:
    """Return [R, N]: the first `sizes_G[0]` rows times the first kernel, the next ones times the second, and so on.

    Rows after the last group, and their gradients, may have any value, including NaN.

    Args:
      rows_RxK: rows, sorted by group.
      kernels_GxKxN: kernels of the same type.
      sizes_G: int32, rows of each group.
      platform: of the devices.
    """
    if platform == "tpu":
        return _by_tiles(rows_RxK, kernels_GxKxN, sizes_G)
    return _by_blocks(rows_RxK, kernels_GxKxN, sizes_G)


def _by_tiles(rows_RxK: jax.Array, kernels_GxKxN: jax.Array, sizes_G: jax.Array, interpret: bool = False) -> jax.Array:
    rows = len(rows_RxK)
    tile = tile_of(rows, *kernels_GxKxN.shape)[0]
    # The kernel takes whole tiles of rows only.
    padded = jnp.pad(rows_RxK, ((0, -rows % tile), (0, 0)))

    def tiling(rows, inputs, outputs):  # the backward pass swaps inputs and outputs
        return tile_of(rows, len(kernels_GxKxN), inputs, outputs)

    out = megablox.gmm(padded, kernels_GxKxN, sizes_G, rows_RxK.dtype, tiling, interpret=interpret)
    return out[:rows]


@jax.custom_vjp
def _by_blocks(rows_RxK: jax.Array, kernels_GxKxN: jax.Array, sizes_G: jax.Array) -> jax.Array:
    return _products(rows_RxK, kernels_GxKxN, sizes_G, inputs=1)


def _by_blocks_forward(rows_RxK, kernels_GxKxN, sizes_G):
    return _by_blocks(rows_RxK, kernels_GxKxN, sizes_G), (rows_RxK, kernels_GxKxN, sizes_G)


def _by_blocks_backward(saved, gradient_RxN):
    rows_RxK, kernels_GxKxN, sizes_G = saved
    block, count, locate = _blocks(len(rows_RxK), sizes_G)
    padded = [jnp.pad(array, ((0, block), (0, 0))) for array in (rows_RxK, gradient_RxN)]

    def add(number, total_GxKxN):
        start, group, end = locate(number)
        real = (start + jnp.arange(block) < end)[:, None]
        # Both factors are masked, because 0 x NaN is NaN.
        x, gradient = (jnp.where(real, lax.dynamic_slice_in_dim(array, start, block), 0) for array in padded)
        return total_GxKxN.at[group].add(jnp.einsum("rk,rn->kn", x, gradient, preferred_element_type=jnp.float32))

    total_GxKxN = lax.fori_loop(0, count, add, jnp.zeros(kernels_GxKxN.shape, jnp.float32))
    of_rows = _products(gradient_RxN, kernels_GxKxN, sizes_G, inputs=2)
    return of_rows, total_GxKxN.astype(kernels_GxKxN.dtype), None


_by_blocks.defvjp(_by_blocks_forward, _by_blocks_backward)


def _products(rows_RxK: jax.Array, kernels: jax.Array, sizes_G: jax.Array, inputs: int) -> jax.Array:
    """Return the products of the rows with the axis `inputs` of the kernels."""
    rows = len(rows_RxK)
    block, count, locate = _blocks(rows, sizes_G)
    padded = jnp.pad(rows_RxK, ((0, block), (0, 0)))

    def write(number, out):
        start, group, _ = locate(number)
        x, kernel = lax.dynamic_slice_in_dim(padded, start, block), kernels[group]
        product = lax.dot_general(x, kernel, (((1,), (inputs - 1,)), ((), ())), preferred_element_type=jnp.float32)
        # What the last block of a group has of the next group is written again by that group.
        return lax.dynamic_update_slice_in_dim(out, product.astype(out.dtype), start, 0)

    out = jnp.zeros((rows + block, kernels.shape[3 - inputs]), rows_RxK.dtype)
    return lax.fori_loop(0, count, write, out)[:rows]


def _blocks(rows: int, sizes_G: jax.Array) -> tuple[int, jax.Array, Callable[[Any], tuple[jax.Array, ...]]]:
    """Return rows of a block, number of blocks, and a function: number of a block -> (start, group, end of group)."""
    block = rows_at_once(rows, len(sizes_G), _LEAST_BLOCK, _MOST_BLOCK)
    ends_G, blocks_G = jnp.cumsum(sizes_G), -(-sizes_G // block)
    last_G = jnp.cumsum(blocks_G)

    def locate(number):
        group = jnp.searchsorted(last_G, number, side="right")
        start = ends_G[group] - sizes_G[group] + block * (number - last_G[group] + blocks_G[group])
        return start, group, ends_G[group]

    return block, last_G[-1], locate
