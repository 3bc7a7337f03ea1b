"""A mixture of experts in place of an MLP: a router sends each token to a few experts, and none is dropped.

The choices of all tokens are sorted by expert, so that each expert multiplies consecutive rows (dropless, as in
MegaBlocks, arXiv 2211.15841). With experts sharded over the mesh axis `expert`, two all-to-alls move the tokens to
their experts and back, and no expert's weights move along that axis. Shapes in names: B batch, T tokens of a row, N
tokens of a device, C choices of a token, X experts, G experts of a device, R rows, E embed, M mlp.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import linear_call
from jax.sharding import PartitionSpec as P

from .. import layout
from ..kernels.grouped import grouped_product
from ..layout import EXPERT_AXIS, SEQUENCE_AXIS, SLICE_AXIS, TENSOR_AXIS
from ..modules import GATES, MLP, fan_in

Routing = dict[str, jax.Array]
ROUTERS = ("softmax", "sigmoid")
_MULTIPLE = 32  # of the rows that a device sends to another in a round, so that kernels get whole tiles
_LATER_ROOM = 0.5  # of rounds after the first


class Router(NamedTuple):
    """Options of the choice of experts.

    Attributes:
      scores: one of `ROUTERS`.
      per_token: number of experts that each token is sent to.
      normed: whether the weights of several experts are scaled to a sum of 1.
      scale: factor of the weights.
      groups: number of groups of experts.
      groups_per_token: number of groups that a token may use.
    """

    scores: str
    per_token: int
    normed: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_per_token: int = 1


class Experts(NamedTuple):
    """The kernels of gated MLPs, gate and up [X, E, M], down [X, M, E], or their specs."""

    gate: Any
    up: Any
    down: Any


def route(
    logits: jax.Array, real: jax.Array, bias_X: jax.Array | None, router: Router
) -> tuple[jax.Array, jax.Array, Routing]:
    """Return the experts of each token and the weights of their outputs.

    The scores of a token are the softmax of its logits (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961) or their
    sigmoids (DeepSeek-V3, arXiv 2412.19437, equations 12 to 16). The experts with the highest scores are chosen; a bias
    changes the choice only. The weights are the scores, with several experts per token scaled to a sum of 1, and then
    multiplied by the router's scale. The weight of one expert stays its score, so that the router learns.

    With several groups a token uses only experts of those groups whose two highest biased scores have the largest sums
    (DeepSeek-V3, section 2.1.2), so that it travels to few nodes.

    Args:
      logits: float32 [..., X].
      real: bool [...]; padding is sent nowhere.
      bias_X: float32, or None.
      router: the options.

    Returns:
      (chosen, weights, routing): int32 and float32 [..., C], X for padding; and sums over real tokens: `assigned` [X],
      tokens that chose each expert; `probability` [X], scores scaled to a sum of 1; and `router_z`, squared logsumexp
      (ST-MoE, arXiv 2202.08906, equation 5).
    """
    experts = logits.shape[-1]
    scores = jax.nn.softmax(logits, axis=-1) if router.scores == "softmax" else jax.nn.sigmoid(logits)
    biased = lax.stop_gradient(scores) + (0 if bias_X is None else bias_X)
    _, chosen = lax.top_k(_within_groups(biased, router) if router.groups > 1 else biased, router.per_token)
    is_chosen = chosen[..., None] == jnp.arange(experts)
    weights = jnp.where(is_chosen, scores[..., None, :], 0).sum(axis=-1)
    if router.normed and router.per_token > 1:
        weights /= jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-20)  # sigmoids may all be 0
    everywhere = tuple(range(real.ndim))
    probabilities = scores / jnp.maximum(scores.sum(axis=-1, keepdims=True), 1e-20)
    routing = {
        "assigned": (is_chosen & real[..., None, None]).sum(axis=(*everywhere, real.ndim), dtype=jnp.float32),
        "probability": jnp.where(real[..., None], probabilities, 0).sum(axis=everywhere),
        "router_z": jnp.where(real, jnp.square(jax.nn.logsumexp(logits, axis=-1)), 0).sum(),
    }
    return jnp.where(real[..., None], chosen, experts), router.scale * weights, routing


def _within_groups(biased: jax.Array, router: Router) -> jax.Array:
    """Return biased scores [..., X], -inf outside the groups that a token may use."""
    grouped = biased.reshape(*biased.shape[:-1], router.groups, -1)
    of_groups = lax.top_k(grouped, 2)[0].sum(axis=-1)
    _, best = lax.top_k(of_groups, router.groups_per_token)
    allowed = (best[..., None] == jnp.arange(router.groups)).any(axis=-2)
    return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(biased.shape)


def leveled(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
    """Return the biases [..., X] after a step with this load: less for experts above the mean, more for those below.

    The change is `rate` for each (arXiv 2408.15664, algorithm 1).
    """
    return bias + rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)


def router_metrics(routing: Routing, per_token: int) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Return means over layers and real tokens, as (total, weight).

    "load_imbalance": load of the busiest expert / mean load; "balance_loss": X sum_x f_x p_x, with f the share of
    choices and p the mean probability of an expert (arXiv 2101.03961, equation 4), 1 if all are equal;
    "router_z_loss".

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
        "load_imbalance": (busiest, tokens),
        "balance_loss": (experts * (share_LxX * probability_LxX).sum(), tokens),
        "router_z_loss": (routing["router_z"].sum(), tokens),
    }


class RoutedMLP(nn.Module):
    """Experts, each a gated MLP with its own kernels, and an MLP of every token; the router's kernel is [E, X].

    The router's kernel is an ordinary matrix: its second axis has no name, because an axis named "experts" would be
    sharded over the mesh and stack vectors for Shampoo.
    """

    experts: int
    width: int  # hidden width of an expert
    shared_width: int  # hidden width of the MLP of every token; 0 for none
    gate: str  # activation of the gates, one of `modules.GATES`
    router: Router
    room: float  # as in `apply_experts`
    writers: int  # parts of all layers that write into the residual stream, for the initialisation
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x_BxTxE: jax.Array, real_BxT: jax.Array, bias_X: jax.Array | None = None
    ) -> tuple[jax.Array, Routing]:
        """Return the update of the residual stream [B, T, E], and the sums of `route`."""
        embed = x_BxTxE.shape[-1]
        router_ExX = self.param("router", fan_in(1.0, "embed", None), (embed, self.experts))
        # float32, because bfloat16 rounding would change the choice of experts (Switch, section 2.4).
        logits = jnp.einsum("bte,ex->btx", x_BxTxE.astype(jnp.float32), router_ExX)
        chosen, weights, routing = route(logits, real_BxT, bias_X, self.router)

        def kernel(name: str, scale: float, inputs: str, outputs: str) -> jax.Array:
            sizes = {"embed": embed, "mlp": self.width}
            init = fan_in(scale, "experts", inputs, outputs, stacked=1)
            return self.param(name, init, (self.experts, sizes[inputs], sizes[outputs])).astype(self.dtype)

        into = kernel("gate", 1.0, "embed", "mlp"), kernel("up", 1.0, "embed", "mlp")
        experts = Experts(*into, kernel("down", 1 / self.writers, "mlp", "embed"))
        added_BxTxE = apply_experts(x_BxTxE, chosen, weights, experts, self.room, self.gate)
        if self.shared_width:
            added_BxTxE += MLP(self.shared_width, self.gate, self.writers, self.dtype, name="shared")(x_BxTxE)
        return added_BxTxE, routing


def apply_experts(
    x_BxTxE: jax.Array,
    chosen_BxTxC: jax.Array,
    weights_BxTxC: jax.Array,
    experts: Experts,
    room: float,
    gate: str = "silu",
) -> jax.Array:
    """Return the weighted sums of the chosen experts' outputs, [B, T, E].

    Every device sorts the choices of its own tokens. Where `expert` shards the experts, the tokens travel in rounds: in
    the first, a device sends to every other one up to `room` times the mean number of rows, enough for even loads.
    Smaller ones follow while any device has rows left. An array with room for the worst case, or gathering all tokens
    along `expert`, would move and store up to (devices along `expert`) / C times as many bytes.

    Args:
      x_BxTxE: tokens.
      chosen_BxTxC: experts of each token; X or more for none.
      weights_BxTxC: float32, weights of their outputs.
      experts: the kernels, of the type of `x_BxTxE`.
      room: rows that a device can send to another in the first round / mean number of rows.
      gate: activation of the gates, one of `modules.GATES`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = layout.parts(EXPERT_AXIS, len(experts.gate))
    sharded = layout.parts(TENSOR_AXIS, experts.gate.shape[2]) > 1
    platform = mesh.abstract_device.platform if mesh.abstract_device else ""
    mixture = functools.partial(_mixture, devices=devices, room=room, gate=gate, platform=platform)
    if mesh.empty:
        return mixture(x_BxTxE, chosen_BxTxC, weights_BxTxC, experts)

    def on_device(x, chosen, weights, experts):
        mixed = mixture(x, chosen, weights, experts)
        return lax.psum(mixed, TENSOR_AXIS) if sharded else mixed

    rows = layout.batch_axes(x_BxTxE.shape[0])
    tokens = P(rows, SEQUENCE_AXIS if layout.parts(SEQUENCE_AXIS, x_BxTxE.shape[1]) > 1 else None)
    of_experts, of_width = EXPERT_AXIS if devices > 1 else None, TENSOR_AXIS if sharded else None
    into = P(of_experts, None, of_width)
    return jax.shard_map(
        on_device,
        in_specs=(tokens, tokens, tokens, Experts(into, into, P(of_experts, of_width, None))),
        out_specs=tokens,
        check_vma=False,
    )(x_BxTxE, chosen_BxTxC, weights_BxTxC, experts)


def _mixture(x_BxTxE, chosen_BxTxC, weights_BxTxC, experts, *, devices, room, gate, platform):
    """Return the sums for the tokens of a device. Each of `devices` along `expert` has as many experts."""
    per_token, local = chosen_BxTxC.shape[-1], len(experts.gate)
    chosen = chosen_BxTxC.reshape(-1)
    x_NxE = x_BxTxE.reshape(-1, x_BxTxE.shape[-1])
    order, places, sizes_X = _sort(chosen, devices * local)
    sizes_D = sizes_X.reshape(devices, local).sum(axis=1)
    most = len(x_NxE) * min(per_token, local)  # rows for one device
    arrays = (x_NxE, weights_BxTxC.reshape(-1, 1), experts)
    indices = (chosen, order, places, sizes_X)
    if devices == 1:
        return _round(0, arrays, indices, 1, len(chosen), gate, platform).reshape(x_BxTxE.shape)

    def round_of(share):
        rows = _MULTIPLE * math.ceil(share * len(chosen) / devices / _MULTIPLE)
        rows = min(rows, most)
        return rows, functools.partial(_round, devices=devices, rows=rows, gate=gate, platform=platform)

    first, later = round_of(room), round_of(_LATER_ROOM)
    # The devices of a slice take as many rounds as the one that needs most: each round has collectives.
    axes = tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis != SLICE_AXIS)
    rounds = lax.pmax(-((first[0] - sizes_D.max()) // later[0]), axes)
    mixed: Any = _rounds(first, later, rounds, arrays, indices)
    return mixed.reshape(x_BxTxE.shape)


def _round(begin, arrays, indices, devices, rows, gate, platform):
    """Return what some choices add to [N, E]: of those for each device, up to `rows` from number `begin`."""
    x_NxE, weights_Mx1, experts = arrays
    chosen_M, order_M, places_M, sizes_X = indices
    local, choices, tokens = len(experts.gate), len(chosen_M), len(x_NxE)
    sizes_D = sizes_X.reshape(devices, local).sum(axis=1)
    starts_D = jnp.cumsum(sizes_D) - sizes_D
    # Each choice has a slot in [devices, rows], and each slot a choice; those that have none have the number of slots,
    # or of choices.
    device_M = jnp.minimum(chosen_M // local, devices - 1)
    column_M = places_M - starts_D[device_M] - begin
    here = (chosen_M < devices * local) & (column_M >= 0) & (column_M < rows)
    slot_M = jnp.where(here, device_M * rows + column_M, devices * rows)
    column_DxR = begin + jnp.arange(rows) + jnp.zeros((devices, 1), jnp.int32)
    place_DxR = jnp.minimum(starts_D[:, None] + column_DxR, choices - 1)
    choice_S = jnp.where(column_DxR < sizes_D[:, None], order_M[place_DxR], choices).reshape(-1)
    token_S, slots_NxC = choice_S // (choices // tokens), slot_M.reshape(tokens, -1)

    sent = _spread(x_NxE, token_S, slots_NxC), _spread(weights_Mx1, choice_S, slot_M[:, None])
    if devices == 1:
        returned = _gated(*sent, experts, sizes_X, gate, platform, filled=1.0)
    else:
        expert_S = jnp.append(chosen_M % local, local)[choice_S]
        received, weights_Sx1, expert_S = (_exchange(array) for array in (*sent, expert_S))
        order_S, places_S, sizes_G = _sort(expert_S, local)
        moved = (_permute(array, order_S, places_S) for array in (received, weights_Sx1))
        out = _gated(*moved, experts, sizes_G, gate, platform, filled=min(1.0, choices / (devices * rows)))
        returned = _exchange(_permute(out, places_S, order_S))
    return _collect(returned, token_S, slots_NxC)


def _gated(x_RxE, weights_Rx1, experts, sizes_G, gate, platform, filled):
    """Return the weighted outputs of the experts for sorted rows, of which a share is `filled` under even load."""

    def product(rows, kernels):
        with jax.named_scope(f"filled_{filled:.3f}"):  # for planning
            return grouped_product(rows, kernels, sizes_G, platform)

    x_RxE = checkpoint_name(x_RxE, "routed")
    gate_RxM = checkpoint_name(product(x_RxE, experts.gate), "gate")
    up_RxM = checkpoint_name(product(x_RxE, experts.up), "up")
    # Weighted before the last product, so that the weights' gradient needs no output of it.
    return product((GATES[gate](gate_RxM) * up_RxM * weights_Rx1).astype(x_RxE.dtype), experts.down)


def _exchange(array):
    """Send part d of [devices x rows, ...] to device d along `expert`; return the parts of all devices in order."""
    return lax.all_to_all(array, EXPERT_AXIS, 0, 0, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounds(first, later, rounds, arrays, indices):
    """Return the sum of a first round and `rounds` later ones, each (rows, function).

    The backward pass computes all but the first again.
    """
    return _rounds_forward(first, later, rounds, arrays, indices)[0]


def _rounds_forward(first, later, rounds, arrays, indices):
    total, pull = jax.vjp(lambda arrays: first[1](0, arrays, indices), arrays)

    def add(number, total):
        return total + later[1](first[0] + number * later[0], arrays, indices)

    with jax.named_scope("rarely"):  # for planning
        total = lax.fori_loop(0, rounds, add, total)
    return total, (pull, rounds, arrays, indices)


def _rounds_backward(first, later, saved, gradient):
    pull, rounds, arrays, indices = saved

    def add(number, total):
        _, pull = jax.vjp(lambda arrays: later[1](first[0] + number * later[0], arrays, indices), arrays)
        return jax.tree.map(jnp.add, total, *pull(gradient))

    with jax.named_scope("rarely"):
        return None, lax.fori_loop(0, rounds, add, *pull(gradient)), None


_rounds.defvjp(_rounds_forward, _rounds_backward)


def _sort(groups_M, count):
    """Sort rows by group, stably. Return the row at each place, the place of each row, rows of each group < count."""
    order_M = jnp.argsort(groups_M, stable=True)
    sizes = (groups_M[:, None] == jnp.arange(count)).sum(axis=0, dtype=jnp.int32)
    return order_M, jnp.argsort(order_M), sizes


# All moves of rows are gathers. JAX's own transpose of a gather is a scatter, which accelerators compute row by row.
def _spread(array, source_S, slots_NxC):
    """Return array[source]. The slots that have a copy of row n are `slots[n]`; those without a row may have any."""
    return linear_call(_rows, _sums, (source_S, slots_NxC), array)


def _collect(slots, source_S, slots_NxC):
    """Return for each n the sum of its slots that are in range: the transpose of `_spread`."""
    return linear_call(_sums, _rows, (source_S, slots_NxC), slots)


def _permute(array, order, inverse):
    """Return array[order]."""
    return linear_call(_rows, lambda orders, moved: _rows(orders[::-1], moved), (order, inverse), array)


def _rows(indices, array):
    return array.at[indices[0]].get(mode="clip")


def _sums(indices, slots):
    found = slots.at[indices[1]].get(mode="fill", fill_value=0)
    return found.sum(axis=1, dtype=jnp.float32).astype(slots.dtype)
