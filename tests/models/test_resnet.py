import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from traced import equations

from shampax.models.resnet import ResNetTask

SMALL = ResNetTask(classes=12, stages=(1, 3), width=8, stem="small", label_smoothing=0.1, batch_norm_momentum=0.7)
BASIC = dataclasses.replace(SMALL, block="basic")
TINY = dataclasses.replace(BASIC, stages=(1,))
FIFTY = ResNetTask()


def batch_of(examples=8, side=8, seed=0):
    random = np.random.default_rng(seed)
    return {
        "image": random.integers(0, 256, (examples, side, side, 3), np.uint8),
        "label": random.integers(0, 12, examples, np.int32),
        "weight": np.ones(examples, np.float32),
    }


def spec_of(batch):
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}


def fifty_spec(examples=2):
    shapes = {"image": (224, 224, 3), "label": (), "weight": ()}
    types = {"image": np.uint8, "label": np.int32, "weight": np.float32}
    return {name: jax.ShapeDtypeStruct((examples, *shape), types[name]) for name, shape in shapes.items()}


@functools.cache
def variables_of(task):
    """Return variables drawn by NumPy, so that every scale and running statistic matters."""
    random = np.random.default_rng(1)
    abstract = jax.eval_shape(task.init, jax.random.key(0), spec_of(batch_of()))
    return {
        "params": jax.tree.map(lambda x: random.normal(0.1, 0.3, x.shape).astype(np.float32), abstract["params"]),
        "batch_stats": jax.tree.map(
            lambda x: random.uniform(0.5, 1.5, x.shape).astype(np.float32), abstract["batch_stats"]
        ),
    }


def value_and_grad(task, variables, batch):
    def loss(params):
        return task.loss({**variables, "params": params}, batch, key=jax.random.key(0), train=True)

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])


grad_of = jax.jit(value_and_grad, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 3))
def loss_of(task, variables, batch, train):
    return task.loss(variables, batch, key=jax.random.key(0), train=train)


def assert_close(left, right, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), left, right)


def convolutions(task, spec):
    """Return (kernel shape, stride, result shape) of each convolution of a forward pass, in order."""
    variables = jax.eval_shape(task.init, jax.random.key(0), spec)
    jaxpr = jax.make_jaxpr(lambda *given: task.logits(*given, train=False)[0])(variables, spec)
    return [
        (eqn.invars[1].aval.shape, eqn.params["window_strides"][0], eqn.outvars[0].aval.shape)
        for eqn in equations(jaxpr.jaxpr, unrolled=True)
        if eqn.primitive.name == "conv_general_dilated"
    ]


@pytest.fixture(scope="module")
def fifty_convolutions():
    return convolutions(FIFTY, fifty_spec())


def test_resnet_50_has_the_published_parameters():
    """Fault: there is a block, shortcut or norm too many or too few."""
    variables = jax.eval_shape(FIFTY.init, jax.random.key(0), fifty_spec())
    count = {name: sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for name, tree in variables.items()}
    assert count == {"params": 25_557_032, "batch_stats": 53_120}


def test_version_1_5_strides_in_the_3x3(fifty_convolutions):
    """Fault: the stride is in the first 1x1 as in version 1, which ignores three quarters of its input."""
    assert len(fifty_convolutions) == 53
    strided = [(kernel[0], kernel[3]) for kernel, stride, _ in fifty_convolutions if stride == 2]
    assert strided == [(7, 64), (3, 128), (1, 512), (3, 256), (1, 1024), (3, 512), (1, 2048)]
    sides = [shape[1] for _, _, shape in fifty_convolutions]
    assert [sides.count(side) for side in (112, 56, 28, 14, 7)] == [1, 11, 13, 19, 9]


def test_flops_match_the_traced_convolutions(fifty_convolutions):
    """Count every product of a forward pass. Fault: the formula lacks a term or counts it twice."""
    for task, spec, found in (
        (FIFTY, fifty_spec(), fifty_convolutions),
        (BASIC, spec_of(batch_of(side=9)), convolutions(BASIC, spec_of(batch_of(side=9)))),
    ):
        head = spec["image"].shape[0] * task.classes * found[-1][2][-1]
        products = sum(math.prod(kernel[:3]) * math.prod(shape) for kernel, _, shape in found) + head
        assert task.flops(spec) == 6 * products
    assert FIFTY.flops(fifty_spec(1)) == 6 * 4_089_184_256


def test_flops_agree_with_the_compilers():
    """Fault: the formula has the same error as the test above."""
    task = dataclasses.replace(FIFTY, stages=(1, 1, 1, 1))  # it counts the body of a loop once
    variables = jax.eval_shape(task.init, jax.random.key(0), fifty_spec())
    lowered = jax.jit(lambda *given: task.logits(*given, train=False)[0]).lower(variables, fifty_spec())
    assert lowered.cost_analysis()["flops"] == pytest.approx(task.flops(fifty_spec()) / 3, rel=0.03)


def test_evaluation_depends_on_no_other_example():
    """Fault: evaluation uses batch statistics, so that a prediction depends on other examples."""
    variables, batch = variables_of(SMALL), batch_of()
    logits = jax.jit(lambda batch: SMALL.logits(variables, batch, train=False)[0])
    other = {name: np.concatenate([array[:3], batch_of(seed=5)[name][3:]]) for name, array in batch.items()}
    np.testing.assert_array_equal(logits(batch)[:3], logits(other)[:3])
    assert np.abs(np.asarray(logits(batch))[3:] - np.asarray(logits(other))[3:]).max() > 0.01


@pytest.mark.parametrize("train", [False, True])
def test_padding_examples_have_no_weight(train):
    """Fault: padding rows enter loss, metrics or batch statistics."""
    variables, batch = variables_of(SMALL), batch_of()
    padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch)
    assert_close(loss_of(SMALL, variables, batch, train), loss_of(SMALL, variables, padded, train), 1e-4)
    empty = jax.tree.map(np.zeros_like, batch)
    loss, (state, metrics) = loss_of(SMALL, variables, empty, train)
    assert loss == 0
    assert all(weight == 0 for _, weight in metrics.values())
    jax.tree.map(np.testing.assert_array_equal, state, {"batch_stats": variables["batch_stats"]})


def test_loss_and_metrics_by_hand():
    """Faults: label smoothing in evaluation or of a wrong size; ranks off by one; ties count as hits."""
    variables, batch = variables_of(SMALL), batch_of()
    batch["weight"] = np.array([1, 0, 2, 1, 1, 0.5, 1, 1], np.float32)
    for train in (False, True):
        logits = np.asarray(jax.jit(functools.partial(SMALL.logits, train=train))(variables, batch)[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        targets = np.eye(12)[batch["label"]]
        targets = 0.9 * targets + 0.1 / 12 if train else targets
        rank = (logits > logits[np.arange(8), batch["label"]][:, None]).sum(-1)
        weight = batch["weight"]
        nats = -(targets * log_p).sum(-1)
        loss, (_, metrics) = loss_of(SMALL, variables, batch, train)
        expected = {
            "loss": ((nats * weight).sum(), 7.5),
            "accuracy": (weight[rank == 0].sum(), 7.5),
            "top5": (weight[rank < 5].sum(), 7.5),
        }
        assert_close(metrics, expected, 1e-4)
        assert_close(loss, expected["loss"][0] / 7.5, 1e-4)


def test_equal_logits_are_not_hits():
    """Fault: a network with equal logits for all classes is always right."""
    variables = jax.tree.map(np.zeros_like, variables_of(SMALL))
    _, (_, metrics) = loss_of(SMALL, variables, batch_of(), False)
    assert metrics["accuracy"][0] == metrics["top5"][0] == 0
    assert metrics["loss"][0] / 8 == pytest.approx(math.log(12), rel=1e-5)


def test_initial_scales():
    """Faults: a wrong fan; residual branches do not start at zero."""
    task = ResNetTask(classes=400, stages=(1, 3), width=64, stem="small")
    variables = jax.device_get(jax.jit(task.init)(jax.random.key(0), fifty_spec()))
    params = variables["params"]
    for kernel, fan_out in (
        (params["stem"]["kernel"], 9 * 64),
        (params["stage1_first"]["conv2"]["kernel"], 9 * 64),
        (params["stage2_rest"]["conv3"]["kernel"], 512),
    ):
        assert abs(kernel.std() / (2 / fan_out) ** 0.5 - 1) < 0.05
    assert abs(params["classifier"]["kernel"].std() / 0.01 - 1) < 0.03
    assert not np.array_equal(*params["stage2_rest"]["conv1"]["kernel"])
    for block in ("stage1_first", "stage2_first", "stage2_rest"):
        scales = {name: set(norm["scale"].ravel().tolist()) for name, norm in params[block].items() if "norm" in name}
        last = scales.pop("norm3")
        assert last == {0.0}
        assert set().union(*scales.values()) == {1.0}
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))


def test_types_of_parameters_statistics_and_convolutions():
    """Faults: parameters, statistics or logits are bfloat16; convolutions are float32."""
    task = dataclasses.replace(BASIC, compute_dtype="bfloat16")
    batch = batch_of()
    abstract = jax.eval_shape(task.init, jax.random.key(0), spec_of(batch))
    jaxpr = jax.make_jaxpr(lambda *given: task.logits(*given, train=True))(abstract, batch)
    types = {
        eqn.invars[i].aval.dtype for eqn in equations(jaxpr.jaxpr) for i in (0, 1) if "conv_" in str(eqn.primitive)
    }
    assert types == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jaxpr.out_avals} == {jnp.dtype("float32")}
    gradient = jax.eval_shape(functools.partial(value_and_grad, task), abstract, batch)[1]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("task", [SMALL, BASIC])
def test_logical_axes_name_every_dimension(task):
    """Faults: axes do not fit the arrays; boxes remain in the tree; statistics have no names."""
    variables = jax.eval_shape(task.init, jax.random.key(0), spec_of(batch_of()))
    axes = task.logical_axes(variables)
    allowed = {"layers": {2}, "height": {1, 3}, "width": {1, 3}, "classes": {12}}

    def check(array, names):
        assert type(array) is jax.ShapeDtypeStruct
        assert len(names) == array.ndim
        for name, size in zip(names, array.shape, strict=True):
            assert size in allowed.get(name, {size})

    assert type(variables) is type(axes) is dict
    jax.tree.map(check, variables, axes)
    assert axes["params"]["stage2_rest"]["conv2"]["kernel"] == ("layers", "height", "width", "conv_in", "conv_out")
    assert axes["batch_stats"]["stage2_rest"]["norm1"]["mean"] == ("layers", "norm")


@functools.cache
def on_mesh(devices, group):
    """Compile loss and gradient of 8 examples over so many devices; return the program and its result."""
    task = dataclasses.replace(TINY, batch_norm_group=group)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    variables, batch = jax.device_put(variables_of(task), whole), jax.device_put(batch_of(), rows)
    with jax.set_mesh(mesh):
        step = jax.jit(functools.partial(value_and_grad, task), out_shardings=whole).lower(variables, batch).compile()
    return step, jax.device_get(step(variables, batch))


@pytest.mark.parametrize("group", [0, 2])
def test_batch_norm_is_equal_on_any_mesh(group):
    """Faults: statistics are of each device's examples; groups depend on the mesh; the loss is of one device."""
    (loss, aux), gradient = on_mesh(1, group)[1]
    (other_loss, other_aux), other_gradient = on_mesh(4, group)[1]
    assert_close(loss, other_loss, 1e-5)
    assert_close(aux, other_aux, 1e-4)
    assert_close(gradient, other_gradient, 1e-3)
    if group:
        assert abs(loss - on_mesh(1, 0)[1][0][0]) > 1e-5


def test_groups_within_devices_need_no_traffic():
    """Faults: groups span devices; the partitioner gathers images for them."""
    counts = {}
    for group in (0, 2):
        text = on_mesh(4, group)[0].as_text()
        counts[group] = text.count(" all-reduce(") + text.count(" all-reduce-start(")
        for other in ("all-gather", "all-to-all", "collective-permute"):
            assert f" {other}(" not in text
    assert counts[2] < counts[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": (3, 0)}, r"stages=\(3, 0\)"),
        ({"classes": 0}, "classes=0"),
        ({"block": "wide"}, "'wide': use one of bottleneck, basic"),
        ({"stem": "large"}, "'large': use one of imagenet, small"),
        ({"stem_stride": 2}, "stem_stride=2"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"batch_norm_momentum": 1.0}, "batch_norm_momentum=1.0"),
        ({"batch_norm_group": -1}, "batch_norm_group=-1"),
        ({"pixel_std": (1.0,)}, "give each channel a value"),
        ({"compute_dtype": "float16"}, "'float16'"),
    ],
)
def test_fields_are_checked(fields, message):
    """Fault: an invalid value is accepted at construction and fails inside a trace."""
    with pytest.raises(ValueError, match=message):
        ResNetTask(**fields)


def test_batches_that_do_not_fit_are_refused():
    """Faults: data for another kind of model give a KeyError; another number of channels is broadcast."""
    with pytest.raises(ValueError, match=r"\['tokens'\] and no 'image'"):
        SMALL.init(jax.random.key(0), {"tokens": jax.ShapeDtypeStruct((2, 2), jnp.int32)})
    grey = {"image": jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.uint8)}
    with pytest.raises(ValueError, match="do not have 3 channels"):
        SMALL.init(jax.random.key(0), grey)
