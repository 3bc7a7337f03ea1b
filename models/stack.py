"""One block, many layers: scanned or unrolled, with or without recomputation in the backward pass."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    # Products with weights are kept, attention's (they have batch dimensions, and grow with T^2) are not.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def run_layers(
    block: type[nn.Module], fields: tuple[Any, ...], x: jax.Array, *context: Any, layers: int, remat: str, scan: bool
) -> tuple[jax.Array, Any]:
    """Send `x` through `layers` blocks with parameters of their own; to be called in a module's compact method.

    Args:
      block: made as `block(*fields)`, called as `block(x, *context)`; gives the next x and a tree of arrays or None.
      fields: of every layer's block.
      x: what goes from layer to layer.
      context: what all layers see.
      layers: how many.
      remat: one of `REMAT_POLICIES`.
      scan: trace the block once, its parameters stacked under "layers" along an axis of that name; otherwise they are
        "layers_0", "layers_1" and so on.

    Returns:
      The last x, and what the blocks gave besides, one leading axis over the layers more.
    """
    if remat != "none":
        # Inside scan the loop itself keeps XLA from merging the recomputation away.
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=not scan)
    if scan:
        stack = nn.scan(
            lambda block, x, *context: block(x, *context),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(block(*fields, name="layers"), x, *context)
    given = []
    for layer in range(layers):
        made: Any = block(*fields, name=f"layers_{layer}")
        x, of_layer = made(x, *context)
        given.append(of_layer)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *given)
