import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lm_cases import (
    SMALL,
    assert_close,
    batch_of,
    but_real_tokens,
    grad_of,
    logits_of,
    loss_of,
    quick_jit,
    spec_of,
    value_and_grad,
    variables_of,
)
from traced import dot_flops, equations

from shampax.models.decoder import moe
from shampax.models.kernels import costs, grouped

ROUTED = dataclasses.replace(SMALL, experts=4, experts_per_token=2, layers=2)
AXES = ("data", "expert", "fsdp", "sequence", "tensor")


def mesh_of(**sizes):
    return jax.make_mesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * 5)


@pytest.mark.parametrize(
    ("router", "biased"),
    [
        (moe.Router("softmax", 1, scale=2.5), False),
        (moe.Router("softmax", 3, scale=2.5), True),
        (moe.Router("sigmoid", 1, scale=2.5), True),
        (moe.Router("sigmoid", 2, scale=2.5), False),
        (moe.Router("sigmoid", 3, scale=2.5, groups=3, groups_per_token=2), True),
        (moe.Router("softmax", 2, normed=False, groups=2, groups_per_token=1), False),
    ],
)
def test_routing_against_a_loop(router, biased):
    """Faults: the bias changes a weight, or not the choice; padding is sent or counted; weights of another choice; an
    expert of another group is chosen; groups are ranked by their best expert, or without the bias."""
    random = np.random.default_rng(router.per_token)
    experts = 6
    logits = random.normal(size=(3, 12, experts)).astype(np.float32)
    real = random.random((3, 12)) < 0.8
    bias = np.array([0.0, 0.3, -0.3, 0.0, 0.1, 0.0], np.float32) if biased else None
    chosen, weights, routing = quick_jit(moe.route, static_argnums=3)(logits, real, bias, router)
    exponents = np.exp(logits)
    softmax = router.scores == "softmax"
    scores = exponents / exponents.sum(-1, keepdims=True) if softmax else exponents / (1 + exponents)
    assigned, probability = np.zeros(experts), np.zeros(experts)
    for place in np.ndindex(real.shape):
        ranks = scores[place] + (bias if biased else 0)
        groups = ranks.reshape(router.groups, -1)
        best = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(axis=1), kind="stable")[: router.groups_per_token]
        allowed = np.isin(np.arange(experts) // groups.shape[1], best)
        order = np.argsort(np.where(allowed, -ranks, np.inf), kind="stable")[: router.per_token]
        whole = scores[place][order].sum() if router.normed and router.per_token > 1 else 1
        np.testing.assert_allclose(weights[place], router.scale * scores[place][order] / whole, rtol=1e-5)
        np.testing.assert_array_equal(chosen[place], order if real[place] else [experts] * router.per_token)
        if real[place]:
            assigned[order] += 1
            probability += scores[place] / scores[place].sum()
    z = np.log(exponents.sum(-1))[real] ** 2
    assert_close(routing, {"assigned": assigned, "probability": probability, "router_z": z.sum()}, 1e-5)


def test_scores_of_zero_give_finite_weights():
    """Fault: a token whose sigmoids are all 0 makes the loss NaN."""
    logits = np.full((1, 4), -200, np.float32)
    _, weights, routing = moe.route(logits, np.ones(1, bool), None, moe.Router("sigmoid", 2))
    assert np.isfinite(weights).all() and np.isfinite(routing["probability"]).all()


def test_biases_move_by_the_rate_towards_even_load():
    """Faults: the sign is wrong; the change grows with the load."""
    bias = np.array([[0.5, 0.0, -0.5], [0.0, 0.0, 0.0]], np.float32)
    moved = moe.leveled(jnp.asarray(bias), jnp.asarray([[9.0, 0.0, 3.0], [4.0, 4.0, 4.0]]), 0.01)
    assert_close(moved, [[0.49, 0.01, -0.49], [-0.0, 0.0, 0.0]], 1e-7)


def product_by_loop(rows, kernels, sizes):
    ends = np.cumsum(sizes)
    return jnp.concatenate([rows[e - n : e] @ kernel for e, n, kernel in zip(ends, sizes, kernels, strict=True)])


@pytest.mark.parametrize("product", [grouped._by_blocks, functools.partial(grouped._by_tiles, interpret=True)])
@pytest.mark.parametrize("sizes", [(100, 0, 7, 130, 0), (0, 0, 0, 256, 0), (0, 0, 0, 0, 0)])
def test_grouped_product_against_a_loop(product, sizes):
    """Faults: a block or tile overwrites rows of the next group; an empty group shifts the kernels; rows after the
    groups reach a gradient."""
    random = np.random.default_rng(0)
    rows, kernels, wanted = (random.normal(size=s).astype(np.float32) for s in ((256, 128), (5, 128, 256), (256, 256)))
    used = sum(sizes)

    def both(product, rows, wanted):
        out, pull = jax.vjp(product, rows, kernels)
        of_rows, of_kernels = pull(wanted)
        return out[:used], of_rows[:used], of_kernels

    rows[used:] = wanted[used:] = np.nan
    kernels = jnp.asarray(kernels)
    sizes_G = jnp.array(sizes, jnp.int32)
    found = quick_jit(functools.partial(both, lambda rows, kernels: product(rows, kernels, sizes_G)))(rows, wanted)
    loop = functools.partial(product_by_loop, sizes=sizes)
    assert_close(found, both(loop, rows[:used], wanted[:used]) if used else jax.tree.map(jnp.zeros_like, found), 1e-4)


def experts_case(seed=0, batch=8, length=64, embed=32, width=48, count=4, per_token=2):
    """Return tokens, chosen experts, weights and kernels; most tokens of half of the rows choose two experts."""
    random = np.random.default_rng(seed)
    chosen = np.argsort(random.random((batch, length, count)), axis=-1)[..., :per_token].astype(np.int32)
    chosen[: batch // 2, 3:] = np.arange(count - per_token, count)
    chosen[0, 3:5] = count  # padding
    shapes = (count, embed, width), (count, embed, width), (count, width, embed)
    experts = moe.Experts(*(random.normal(size=shape).astype(np.float32) for shape in shapes))
    x = random.normal(size=(batch, length, embed)).astype(np.float32)
    return x, chosen, random.random(chosen.shape).astype(np.float32), experts


def experts_by_loop(x, chosen, weights, experts, activation=jax.nn.silu):
    total = jnp.zeros_like(x)
    for number, (gate, up, down) in enumerate(zip(*experts, strict=True)):
        weight = jnp.where(chosen == number, weights, 0).sum(axis=-1, keepdims=True)
        total += weight * ((activation(x @ gate) * (x @ up)) @ down)
    return total


def with_gradients(apply, x, chosen, weights, experts):
    out, pull = jax.vjp(lambda x, weights, experts: apply(x, chosen, weights, experts), x, weights, experts)
    return out, *pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))


@pytest.mark.parametrize(
    ("room", "sizes"),
    [
        (1.5, {}),
        (0.75, {"expert": 4, "tensor": 2}),
        pytest.param(1.0, {"data": 2, "expert": 2, "fsdp": 2}, marks=pytest.mark.slow),
        pytest.param(1.0, {"data": 2, "expert": 2, "sequence": 2}, marks=pytest.mark.slow),
        pytest.param(4.0, {"expert": 4, "fsdp": 2}, marks=pytest.mark.slow),
        pytest.param(1.5, {"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_experts_against_a_loop(room, sizes):
    """Faults: tokens beyond the room are dropped; a round counts twice; a token gets the output of another; a gradient
    is added too often along a mesh axis."""
    case = experts_case()
    expected = quick_jit(functools.partial(with_gradients, experts_by_loop))(*case)
    apply = quick_jit(functools.partial(with_gradients, functools.partial(moe.apply_experts, room=room)))
    if sizes:
        with jax.set_mesh(mesh_of(**sizes)):
            found = apply(*case)
    else:
        found = apply(*case)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max()), jax.device_get(found), expected
    )
    assert not found[0][0, 3:5].any()


def test_experts_with_another_activation():
    """Fault: experts are SwiGLUs whatever the model's activation is."""
    case = experts_case()
    found = quick_jit(functools.partial(moe.apply_experts, room=1.5, gate="gelu"))(*case)
    expected = experts_by_loop(*case, activation=jax.nn.gelu)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_products_at_128_experts():
    """Fault: experts multiply rows that are not theirs, or room for such rows.

    Counted in the jaxpr, loops at the number of blocks of this load; of TPUs the tiles that the kernel visits.
    """
    random = np.random.default_rng(0)
    length, per_token, count, embed, width = 2_048, 8, 128, 16, 32
    popular = np.argsort(random.gumbel(size=(2, length, count)) + random.normal(size=count) / 2, axis=-1)
    chosen = popular[..., :per_token].astype(np.int32)
    experts = moe.Experts(
        *(np.zeros((count, *s), np.float32) for s in ((embed, width), (embed, width), (width, embed)))
    )
    case = np.zeros((2, length, embed), np.float32), chosen, np.ones(chosen.shape, np.float32), experts
    apply = functools.partial(with_gradients, functools.partial(moe.apply_experts, room=1.5))
    sizes, rows = jnp.bincount(chosen.ravel(), length=count).astype(jnp.int32), chosen.size
    _, blocks, _ = grouped._blocks(rows, sizes)
    jaxpr = jax.make_jaxpr(apply)(*case).jaxpr
    bodies = [eqn.params["body_jaxpr"].jaxpr for eqn in equations(jaxpr) if eqn.primitive.name == "while"]
    in_loops = [eqn for body in bodies for eqn in equations(body) if eqn.primitive.name == "dot_general"]
    assert len(in_loops) == 9 == sum(eqn.primitive.name == "dot_general" for eqn in equations(jaxpr))
    assert 1 <= int(blocks) * sum(map(dot_flops, in_loops)) / (3 * 2 * 3 * rows * embed * width) <= 1.1
    # On a TPU with 16 devices along `expert`, each of which gets as many rows as all have together here.
    tile, of_eight = costs.tile_of(rows, 8, 128, 128)[0], sizes.reshape(8, 16).sum(axis=1)
    groups = {"group_sizes": of_eight, "start_group": 0, "num_nonzero_groups": 8, "visit_empty_groups": True}
    _, tiles = make_group_metadata(m=rows, tm=tile, **groups)
    assert tiles * tile <= 1.1 * rows


def test_one_expert_is_the_dense_model():
    """Fault: experts scale, shift or lose the output of the MLP."""
    routed = dataclasses.replace(SMALL, experts=1, experts_per_token=1, balance_loss=0.0, router_z_loss=0.0)
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


DEEPSEEK = dataclasses.replace(
    ROUTED, router="sigmoid", router_scale=2.5, balance_rate=0.01, shared_experts=1, dense_layers=1, expert_dim=24
)


def test_a_document_does_not_depend_on_its_neighbours():
    """Faults: tokens of other documents take the place of a token; its experts' outputs are summed in another order."""
    batch, variables = batch_of([[1] * 17, [1] * 6 + [2] * 11]), variables_of(DEEPSEEK)
    other = {name: array.copy() for name, array in batch.items()}
    other["tokens"][0] = (other["tokens"][0] + 7) % 64
    other["tokens"][1, 6:] = 3  # all of these choose the same experts
    first, second = (logits_of(DEEPSEEK, variables, each) for each in (batch, other))
    np.testing.assert_array_equal(first[1, :6], second[1, :6])
    assert np.abs(first[1, 6:] - second[1, 6:]).max() > 0.1


def test_biases_choose_the_experts_and_the_load_is_counted():
    """Faults: the bias of another layer is used; it does not reach the router; loads of micro-batches are not added;
    evaluation counts."""
    batch, variables = batch_of(), variables_of(DEEPSEEK)
    bias = np.array([[3.0, 0.0, 3.0, -3.0]], np.float32)
    variables = variables | {"routers": {"bias": bias, "load": np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)}}
    _, (state, _) = loss_of(DEEPSEEK, variables, batch)
    real = (batch["segments"][:, :-1] > 0).sum()
    assert_close(state["routers"], {"bias": bias, "load": [[1.0 + real, 2.0, 3.0 + real, 4.0]]}, 1e-6)
    _, (unchanged, _) = loss_of(DEEPSEEK, variables, batch, False)
    assert_close(unchanged["routers"], variables["routers"], 0)
    after = DEEPSEEK.settle(state)["routers"]
    assert_close(after, {"bias": [[2.99, 0.01, 2.99, -2.99]], "load": np.zeros((1, 4))}, 1e-6)


def test_metrics_and_losses_of_routers():
    """Faults: training leaves out a router loss or evaluation includes it; a mean is over the wrong tokens."""
    task = dataclasses.replace(ROUTED, balance_loss=0.5, router_z_loss=0.25)
    batch, variables = batch_of(), variables_of(ROUTED)
    loss, (_, metrics) = loss_of(task, variables, batch)
    heldout, (_, heldout_metrics) = loss_of(task, variables, batch, False)
    values = {name: total / weight for name, (total, weight) in metrics.items()}
    expected = heldout + 0.5 * values["balance_loss"] + 0.25 * values["router_z_loss"]
    assert_close(loss, expected, 1e-5)
    assert 1 <= values["load_imbalance"] <= 4
    assert metrics["load_imbalance"][1] == 2 * (batch["segments"][:, :-1] > 0).sum()
    assert_close(heldout_metrics["balance_loss"], metrics["balance_loss"], 1e-5)
    even = {"assigned": np.full((1, 4), 6.0), "probability": np.full((1, 4), 3.0)}
    metrics = moe.router_metrics(jax.tree.map(jnp.asarray, even | {"router_z": np.zeros(1)}), 2)
    assert metrics["balance_loss"][0] / metrics["balance_loss"][1] == 1
    assert metrics["load_imbalance"][0] / metrics["load_imbalance"][1] == 1


def test_padding_has_no_weight():
    """Fault: padding rows count as tokens of an expert."""
    batch, variables = batch_of(), variables_of(ROUTED)
    padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch)
    assert_close(*(but_real_tokens(loss_of(ROUTED, variables, x)) for x in (batch, padded)), 1e-5)


def test_flops_count_the_experts_of_a_token():
    """Faults: MFU counts all experts, or one; it forgets shared experts; layers without experts have routers."""
    spec = spec_of(batch_of())
    twice_as_wide = dataclasses.replace(SMALL, mlp_dim=2 * SMALL.mlp_dim)
    tokens, router = 4 * 16, 32 * 4
    assert ROUTED.flops(spec) == twice_as_wide.flops(spec) + 6 * tokens * router * 2
    # A layer with an MLP of 48, and one with (2 + 1) experts of 24.
    assert DEEPSEEK.flops(spec) == SMALL.flops(spec) + 6 * tokens * (router + 3 * 32 * (3 * 24 - 48))


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
    mesh = mesh_of(**sizes)
    task = dataclasses.replace(ROUTED, shared_experts=1, balance_rate=0.1)
    batch, variables = batch_of([[1] * 17] * 4 + [[1] * 9 + [2] * 8] * 4), variables_of(task)
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
