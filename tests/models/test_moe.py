import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lm_cases import SMALL, assert_close, batch_of, grad_of, loss_of, quick_jit, spec_of, value_and_grad, variables_of

from shampax.models import moe

ROUTED = dataclasses.replace(SMALL, experts=4, experts_per_token=2, capacity_factor=1.0, layers=2)


def routed_by_hand(probabilities, real, per_token, factor):
    """Loop over choices, then tokens. Return (expert, slot, weight) of each token, and the number of dropped ones."""
    tokens, count = probabilities.shape
    capacity = min(tokens, max(1, int(np.ceil(tokens * per_token * factor / count))))
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :per_token]
    full, places, dropped = np.zeros(count, int), [[] for _ in range(tokens)], 0
    for choice in range(per_token):
        for token in range(tokens):
            if not real[token]:
                continue
            expert = order[token, choice]
            weight = probabilities[token, expert]
            if per_token > 1:
                weight /= probabilities[token, order[token]].sum()
            if full[expert] < capacity:
                places[token].append((expert, full[expert], weight))
            else:
                dropped += 1
            full[expert] += 1
    return places, full, dropped


@pytest.mark.parametrize(("per_token", "factor"), [(1, 1.0), (2, 1.0), (2, 0.3), (3, 4.0)])
def test_routing_against_a_loop(per_token, factor):
    """Faults: two tokens share a slot; the wrong ones are dropped; padding uses slots; weights are of another
    choice."""
    random = np.random.default_rng(per_token)
    logits = random.normal(size=(3, 12, 5)).astype(np.float32)
    real = random.random((3, 12)) < 0.8
    sent, weights, routing = quick_jit(moe.route, static_argnums=(2, 3))(logits, real, per_token, factor)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected, assigned, dropped = np.zeros(sent.shape), np.zeros(5), 0
    for group in range(3):
        places, full, lost = routed_by_hand(probabilities[group], real[group], per_token, factor)
        assigned, dropped = assigned + full, dropped + lost
        for token, taken in enumerate(places):
            for expert, slot, weight in taken:
                expected[group, token, expert, slot] = weight
    np.testing.assert_array_equal(sent, expected > 0)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    assert dropped > 0 or factor == 4.0
    z = np.log(np.exp(logits).sum(-1))[real] ** 2
    wanted = {
        "assigned": assigned,
        "probability": probabilities[real].sum(axis=0),
        "dropped": dropped,
        "router_z": z.sum(),
    }
    assert_close(routing, wanted, 1e-5)


def test_one_expert_with_room_for_all_is_the_dense_model():
    """Fault: experts scale, shift or lose the output of the MLP."""
    routed = dataclasses.replace(
        SMALL, experts=1, experts_per_token=1, capacity_factor=1.0, balance_loss=0.0, router_z_loss=0.0
    )
    variables, batch = variables_of(SMALL), batch_of()
    with_experts = {"params": dict(variables["params"])}
    layers = dict(with_experts["params"]["layers"])
    mlp = layers.pop("mlp")
    layers["moe"] = {name: mlp[name]["kernel"][:, None] for name in mlp} | {"router": np.ones((2, 32, 1), np.float32)}
    with_experts["params"]["layers"] = layers
    loss, gradient = grad_of(SMALL, variables, batch)
    found, found_gradient = grad_of(routed, with_experts, batch)
    assert_close(loss, found, 1e-5)
    of_mlp = gradient["params"]["layers"].pop("mlp")
    of_experts = found_gradient["params"]["layers"].pop("moe")
    assert_close(gradient, found_gradient, 1e-4)
    assert_close({name: of_mlp[name]["kernel"] for name in of_mlp}, {n: of_experts[n][:, 0] for n in of_mlp}, 1e-4)


def apply_experts(module, x, real, seed=0):
    variables = module.init(jax.random.key(seed), x, real)
    return module.apply(variables, x, real)


def test_dropped_tokens_and_padding_are_unchanged():
    """Faults: a dropped token gets the output of another; padding displaces tokens."""
    module = moe.RoutedSwiGLU(2, 1, 0.25, 0, 12, 2, jnp.dtype("float32"))  # one slot each for 8 tokens
    x = np.random.default_rng(0).normal(size=(1, 8, 6)).astype(np.float32)
    real = np.arange(8)[None] >= 2
    added, routing = quick_jit(functools.partial(apply_experts, module))(x, real)
    answered = np.abs(added[0]).max(axis=-1) > 0
    assert answered.sum() == (np.asarray(routing["assigned"]) > 0).sum() <= 2
    assert not answered[:2].any() and answered[2]
    assert routing["dropped"] == 6 - answered.sum()


def test_groups_are_routed_separately():
    """Faults: groups share slots; they are returned in another order."""
    x = np.random.default_rng(0).normal(size=(2, 8, 6)).astype(np.float32)
    real = np.ones((2, 8), bool)
    by_three, by_four, whole = (moe.RoutedSwiGLU(3, 2, 0.8, group, 12, 2, jnp.dtype("float32")) for group in (3, 4, 0))
    added, routing = quick_jit(functools.partial(apply_experts, by_four))(x, real)
    rows, rows_routing = quick_jit(functools.partial(apply_experts, whole))(x.reshape(4, 4, 6), real.reshape(4, 4))
    assert_close(added.reshape(4, 4, 6), rows, 1e-6)
    assert_close(routing, rows_routing, 1e-5)
    with pytest.raises(ValueError, match=r"task.expert_group=3: must divide rows of 8 tokens"):
        apply_experts(by_three, x, real)


def test_metrics_and_losses_of_routers():
    """Faults: training leaves out a router loss or evaluation includes it; a mean is over the wrong tokens."""
    task = dataclasses.replace(ROUTED, balance_loss=0.5, router_z_loss=0.25)
    batch, variables = batch_of(), variables_of(ROUTED)
    loss, (_, metrics) = loss_of(task, variables, batch)
    heldout, (_, heldout_metrics) = loss_of(task, variables, batch, False)
    values = {name: total / weight for name, (total, weight) in metrics.items()}
    expected = heldout + 0.5 * values["balance_loss"] + 0.25 * values["router_z_loss"]
    assert_close(loss, expected, 1e-5)
    assert 0 < values["dropped_tokens"] < 0.6
    assert 1 <= values["load_imbalance"] <= 4
    assert metrics["dropped_tokens"][1] == 2 * 2 * (batch["segments"][:, :-1] > 0).sum()
    assert metrics["load_imbalance"][1] == 2 * (batch["segments"][:, :-1] > 0).sum()
    assert_close(heldout_metrics["balance_loss"], metrics["balance_loss"], 1e-5)
    even = {"assigned": np.full((1, 4), 6.0), "probability": np.full((1, 4), 3.0), "dropped": np.zeros(1)}
    metrics = moe.router_metrics(jax.tree.map(jnp.asarray, even | {"router_z": np.zeros(1)}), 2)
    assert metrics["balance_loss"][0] / metrics["balance_loss"][1] == 1
    assert metrics["load_imbalance"][0] / metrics["load_imbalance"][1] == 1


def test_padding_has_no_weight():
    """Fault: padding rows count as tokens of an expert."""
    batch, variables = batch_of(), variables_of(ROUTED)
    padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch)
    assert_close(loss_of(ROUTED, variables, batch), loss_of(ROUTED, variables, padded), 1e-5)


def test_flops_count_the_experts_of_a_token():
    """Fault: MFU counts all experts, or one."""
    spec = spec_of(batch_of())
    twice_as_wide = dataclasses.replace(SMALL, mlp_dim=2 * SMALL.mlp_dim)
    router = 6 * 4 * 16 * ROUTED.layers * 32 * 4
    assert ROUTED.flops(spec) == twice_as_wide.flops(spec) + router


def test_scales_and_names_of_experts():
    """Faults: the fan-in is that of all experts together; experts are neither sharded nor stacked."""
    task = dataclasses.replace(ROUTED, embed_dim=64, mlp_dim=128)
    params = quick_jit(task.init)(jax.random.key(0), batch_of())["params"]["layers"]["moe"]
    for name, std in (("router", 1 / 8), ("gate", 1 / 8), ("up", 1 / 8), ("down", 128**-0.5 / 2)):
        assert abs(np.std(params[name]) / std - 1) < 0.05, name
    axes = task.logical_axes({"params": params} | variables_of(ROUTED))["params"]["layers"]["moe"]
    assert axes == {
        "router": ("layers", "embed", None),
        "gate": ("layers", "experts", "embed", "mlp"),
        "up": ("layers", "experts", "embed", "mlp"),
        "down": ("layers", "experts", "mlp", "embed"),
    }


RULES = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor", "kv_heads": "tensor", "experts": "expert"}


@pytest.mark.parametrize(
    "sizes",
    [{"expert": 4, "fsdp": 2}, pytest.param({"data": 2, "expert": 2, "sequence": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_sharded_experts_equal_one_device(sizes):
    """Faults: tokens reach another expert; the weights of all experts are gathered instead of moving tokens."""
    names = ("data", "expert", "fsdp", "sequence", "tensor")
    mesh = jax.make_mesh(tuple(sizes.get(name, 1) for name in names), names, axis_types=(AxisType.Auto,) * 5)
    task = dataclasses.replace(ROUTED, expert_group=8)
    batch, variables = batch_of([[1] * 17] * 4 + [[1] * 9 + [2] * 8] * 4), variables_of(ROUTED)
    shardings = jax.tree.map(
        lambda _, axes: NamedSharding(mesh, P(*map(RULES.get, axes))), variables, task.logical_axes(variables)
    )
    by_batch = NamedSharding(mesh, P(("data", "fsdp", "expert")))
    step = quick_jit(
        functools.partial(value_and_grad, task),
        in_shardings=(shardings, by_batch),
        out_shardings=(NamedSharding(mesh, P()), shardings),
    )
    with jax.set_mesh(mesh):
        step = step.lower(variables, batch).compile()
    sharded = step(jax.device_put(variables, shardings), jax.device_put(batch, by_batch))
    assert_close(grad_of(task, variables, batch), jax.device_get(sharded), 1e-4)
    text = step.as_text()
    assert len(re.findall(r" all-to-all\(", text)) >= 4  # there and back, forward and backward
    experts = task.experts * task.embed_dim * task.mlp_dim
    for shapes in re.findall(r"= (.*?) all-gather\(", text):
        for dims in re.findall(r"\w+\[([\d,]+)\]", shapes):
            assert np.prod([int(size) for size in dims.split(",")]) < experts, dims
