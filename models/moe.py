"""A mixture of experts in place of an MLP: a router sends each token to a few experts.

Token-choice top-k routing with bounded expert capacity (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961). Dispatch
and combine are einsums with one-hot tensors. With experts sharded over the mesh axis `expert`, the partitioner turns
each into an all-to-all of tokens, and no expert's weights move. Shapes in names: B batch, N groups of a row, T tokens
of a group, X experts, C capacity, E embed, M mlp.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from .layout import EXPERT_AXIS, SEQUENCE_AXIS, shard_batch
from .modules import fan_in

Routing = dict[str, jax.Array]


def route(
    logits: jax.Array, real: jax.Array, per_token: int, capacity_factor: float
) -> tuple[jax.Array, jax.Array, Routing]:
    """Return the experts of each token and the weights of their outputs.

    First choices are served before second ones, earlier tokens before later ones. A token gets nothing from a full
    expert. With one expert per token its weight is the probability, so that the router learns; with more, the
    probabilities of the chosen experts are scaled to a sum of 1.

    Args:
      logits: float32 [..., T, X].
      real: bool [..., T]; padding is sent nowhere.
      per_token: number of experts that each token is sent to.
      capacity_factor: capacity of an expert as a multiple of the mean load.

    Returns:
      (sent, weights, routing): bool and float32 [..., T, X, C], token t in slot c of expert x; and sums over real
      tokens: `assigned` [X], tokens that chose each expert; `probability` [X]; `dropped`, choices of a full expert; and
      `router_z`, squared logsumexp (ST-MoE, arXiv 2202.08906, equation 5).
    """
    tokens, count = logits.shape[-2:]
    capacity = min(tokens, max(1, math.ceil(tokens * per_token * capacity_factor / count)))
    probabilities = jax.nn.softmax(logits, axis=-1)
    gates, chosen = jax.lax.top_k(probabilities, per_token)
    if per_token > 1:
        gates /= gates.sum(axis=-1, keepdims=True)
    everywhere = tuple(range(logits.ndim - 1))
    taken = jnp.zeros((*logits.shape[:-2], 1, count), jnp.int32)
    sent, weights = jnp.zeros((), bool), jnp.zeros(())
    assigned = jnp.zeros(count)
    for choice in range(per_token):
        wanted = jax.nn.one_hot(chosen[..., choice], count, dtype=jnp.int32) * real[..., None]
        slots = jnp.cumsum(wanted, axis=-2) - 1 + taken
        taken += wanted.sum(axis=-2, keepdims=True)
        assigned += wanted.sum(axis=everywhere, dtype=jnp.float32)
        # A slot beyond the capacity has a one-hot of zeros.
        here = jax.nn.one_hot(slots, capacity, dtype=bool) & (wanted[..., None] > 0)
        sent |= here
        weights += here * gates[..., choice, None, None]
    routing = {
        "assigned": assigned,
        "probability": jnp.where(real[..., None], probabilities, 0).sum(axis=everywhere),
        "dropped": assigned.sum() - sent.sum(dtype=jnp.float32),
        "router_z": jnp.where(real, jnp.square(jax.nn.logsumexp(logits, axis=-1)), 0).sum(),
    }
    return sent, weights, routing


def router_metrics(routing: Routing, per_token: int) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Return means over layers and real tokens, as (total, weight).

    "dropped_tokens": share of choices dropped by full experts; "load_imbalance": load of the busiest expert / mean
    load; "balance_loss": X sum_x f_x p_x, with f the share of choices and p the mean probability of an expert (arXiv
    2101.03961, equation 4), 1 if all are equal; "router_z_loss".

    Args:
      routing: sums of `route`, with a leading dimension for the layers.
      per_token: number of experts that each token chooses.
    """
    assigned_LxX, probability_LxX = routing["assigned"], routing["probability"]
    experts = assigned_LxX.shape[-1]
    choices_L = assigned_LxX.sum(axis=-1)
    tokens = choices_L.sum() / per_token
    share_LxX = assigned_LxX / jnp.maximum(choices_L, 1)[:, None]
    busiest = experts * share_LxX.max(axis=-1) @ choices_L / per_token
    return {
        "dropped_tokens": (routing["dropped"].sum(), choices_L.sum()),
        "load_imbalance": (busiest, tokens),
        "balance_loss": (experts * (share_LxX * probability_LxX).sum(), tokens),
        "router_z_loss": (routing["router_z"].sum(), tokens),
    }


class RoutedSwiGLU(nn.Module):
    """Experts, each a SwiGLU with its own kernels: gate and up [X, E, M], down [X, M, E]; router [E, X].

    The router's kernel is an ordinary matrix: its second axis has no name, because an axis named "experts" would be
    sharded over the mesh and stack vectors for Shampoo.
    """

    experts: int
    per_token: int  # experts that each token is sent to
    capacity_factor: float
    group: int  # neighbouring tokens of a row that share a capacity; 0 for the whole row
    mlp_dim: int
    writers: int  # parts of all layers that write into the residual stream, for the initialisation
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array, real_BxT: jax.Array) -> tuple[jax.Array, Routing]:
        """Return the update of the residual stream [B, T, E], and the sums of `route`.

        Raises:
          ValueError: the row is not divisible into groups.
        """
        batch, length, embed = x_BxTxE.shape
        group = min(self.group, length) or length
        if length % group:
            raise ValueError(f"task.expert_group={group}: must divide rows of {length} tokens")
        x_BxNxTxE = x_BxTxE.reshape(batch, length // group, group, embed)
        real_BxNxT = real_BxT.reshape(x_BxNxTxE.shape[:3])
        router_ExX = self.param("router", fan_in(1.0, "embed", None), (embed, self.experts))
        # float32, because bfloat16 rounding would change the choice of experts (Switch, section 2.4).
        logits = jnp.einsum("bnte,ex->bntx", x_BxNxTxE.astype(jnp.float32), router_ExX)
        sent, weights, routing = route(logits, real_BxNxT, self.per_token, self.capacity_factor)

        def kernel(name: str, scale: float, inputs: str, outputs: str) -> jax.Array:
            sizes = {"embed": embed, "mlp": self.mlp_dim}
            init = fan_in(scale, "experts", inputs, outputs, stacked=1)
            return self.param(name, init, (self.experts, sizes[inputs], sizes[outputs])).astype(self.dtype)

        # Sharded by groups first, for the backward pass: otherwise the partitioner gathers the tokens of the whole
        # batch on every device for the gradient's product with `sent`.
        into = shard_batch(jnp.einsum("bntxc,bnte->bxnce", sent.astype(self.dtype), x_BxNxTxE), None, SEQUENCE_AXIS)
        into = shard_batch(into, EXPERT_AXIS, SEQUENCE_AXIS)
        gate = jnp.einsum("bxnce,xem->bxncm", into, kernel("gate", 1.0, "embed", "mlp"))
        up = jnp.einsum("bxnce,xem->bxncm", into, kernel("up", 1.0, "embed", "mlp"))
        down = kernel("down", 1 / self.writers, "mlp", "embed")
        out = shard_batch(jnp.einsum("bxncm,xme->bxnce", nn.silu(gate) * up, down), EXPERT_AXIS, SEQUENCE_AXIS)
        out = shard_batch(out, None, SEQUENCE_AXIS)
        mixed = jnp.einsum("bntxc,bxnce->bnte", weights.astype(self.dtype), out)
        return shard_batch(mixed.reshape(x_BxTxE.shape), SEQUENCE_AXIS), routing
