import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from traced import dot_flops, equations, quick_jit

from shampax.models import classification, vit
from shampax.models.vit import ViTTask

SMALL = ViTTask(classes=7, patch_size=4, layers=2, embed_dim=16, heads=2, mlp_dim=24, registers=3)
MIXED = dataclasses.replace(SMALL, mixup=0.4, label_smoothing=0.1)
EXAMPLES, SIDES = 8, (8, 12)


def batch_of(examples=EXAMPLES, seed=0):
    random = np.random.default_rng(seed)
    return {
        "image": random.integers(0, 256, (examples, *SIDES, 3), np.uint8),
        "label": random.integers(0, 7, examples, np.int32),
        "weight": np.ones(examples, np.float32),
    }


def spec_of(batch):
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}


def imagenet_spec(examples=2):
    shapes = {"image": ((224, 224, 3), np.uint8), "label": ((), np.int32), "weight": ((), np.float32)}
    return {name: jax.ShapeDtypeStruct((examples, *shape), kind) for name, (shape, kind) in shapes.items()}


@functools.cache
def variables():
    """Return variables drawn by NumPy, so that every bias and scale matters."""
    random = np.random.default_rng(1)
    abstract = jax.eval_shape(SMALL.init, jax.random.key(0), spec_of(batch_of()))
    return jax.tree.map(lambda x: random.normal(0.1, 0.3, x.shape).astype(np.float32), abstract)


@functools.partial(quick_jit, static_argnames=("task", "train"))
def loss_of(batch, task=SMALL, *, train=False, seed=0):
    return task.loss(variables(), batch, key=jax.random.key(seed), train=train)


def reference_logits(batch):
    """Compute the model in float64, one patch and one head after the other."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables()["params"])

    def normed(x, layer):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * layer["scale"] + layer["bias"]

    def gelu(x):
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    def position(row, column):
        wave = [10_000 ** (-i / 3) for i in range(4)]
        return [f(at * w) for at in (row, column) for f in (math.sin, math.cos) for w in wave]

    logits = []
    for image in batch["image"]:
        pixels = (image / 255 - np.array(SMALL.pixel_mean)) / np.array(SMALL.pixel_std)
        tokens = []
        for row in range(SIDES[0] // 4):
            for column in range(SIDES[1] // 4):
                patch = pixels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1)
                tokens.append(patch @ params["patches"]["kernel"] + params["patches"]["bias"] + position(row, column))
        count = len(tokens)
        x = np.stack([*tokens, *params["registers"]])
        for layer in range(SMALL.layers):
            block = jax.tree.map(lambda array, layer=layer: array[layer], params["layers"])
            y, of = normed(x, block["attention_norm"]), block["attention"]
            update = np.zeros_like(x) + of["out"]["bias"]
            for head in range(SMALL.heads):
                q, k, v = (
                    y @ of[name]["kernel"][:, head] + of[name]["bias"][head] for name in ("query", "key", "value")
                )
                scores = np.exp(q @ k.T / math.sqrt(q.shape[-1]))
                update += scores / scores.sum(-1, keepdims=True) @ v @ of["out"]["kernel"][head]
            x = x + update
            y, of = normed(x, block["mlp_norm"]), block["mlp"]
            x = x + gelu(y @ of["up"]["kernel"] + of["up"]["bias"]) @ of["down"]["kernel"] + of["down"]["bias"]
        features = normed(x, params["norm"])[:count].mean(0)
        logits.append(features @ params["classifier"]["kernel"] + params["classifier"]["bias"])
    return np.array(logits)


def test_agrees_with_numpy_in_float64():
    """Faults: pixels of a patch are mixed with those of others; rows and columns are confused; registers enter the
    mean, or do not take part in attention."""
    batch = batch_of()
    logits = quick_jit(SMALL.logits)(variables(), batch)
    np.testing.assert_allclose(logits, reference_logits(batch), rtol=1e-4, atol=1e-4)


def test_vit_s_16_has_the_parameters_of_the_plain_form():
    """Fault: a bias, norm or projection is missing. A class token and learned positions make the published number."""
    abstract = jax.eval_shape(ViTTask().init, jax.random.key(0), imagenet_spec())
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract))
    assert count == 22_050_664 - (197 + 1) * 384 == 21_974_632


def test_flops_count_every_product():
    """Fault: the FLOPs for MFU lack a term or count it twice."""
    for task, spec in ((SMALL, spec_of(batch_of())), (ViTTask(), imagenet_spec())):
        abstract = jax.eval_shape(task.init, jax.random.key(0), spec)
        jaxpr = jax.make_jaxpr(task.logits)(abstract, spec)
        products = [eqn for eqn in equations(jaxpr.jaxpr, unrolled=True) if eqn.primitive.name == "dot_general"]
        assert task.flops(spec) == 3 * sum(map(dot_flops, products))


def test_a_new_model_gives_all_classes_the_same_logit():
    """Faults: the classifier does not begin at zero; kernels have another scale."""
    made = quick_jit(SMALL.init)(jax.random.key(0), spec_of(batch_of()))["params"]
    assert not np.any(made["classifier"]["kernel"])
    assert made["layers"]["mlp"]["up"]["kernel"].std() == pytest.approx(0.88 * 0.02, rel=0.1)


def test_mixup_by_hand():
    """Faults: images and labels are mixed in different proportions, or with different neighbours; smoothing is lost;
    evaluation mixes."""
    batch = batch_of()
    share = np.asarray(vit._shares(jax.random.key(3), MIXED.mixup, batch["weight"]), np.float64)
    assert (share[::2] == share[1::2]).all() and len(set(share)) == EXAMPLES // 2 and ((share > 0) & (share < 1)).all()
    other = np.arange(EXAMPLES) ^ 1
    pixels = np.asarray(classification.normalized(MIXED, batch["image"], jnp.dtype(jnp.float32)), np.float64)
    mixed = np.einsum("b,b...->b...", share, pixels) + np.einsum("b,b...->b...", 1 - share, pixels[other])
    mixed = (mixed * np.array(MIXED.pixel_std) + np.array(MIXED.pixel_mean)) * 255
    logits = reference_logits({"image": mixed})
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = np.eye(7)[batch["label"]]
    targets = share[:, None] * targets + (1 - share[:, None]) * targets[other]
    wanted = -((0.9 * targets + 0.1 / 7) * log_p).sum(-1).mean()
    loss, (state, metrics) = loss_of(batch, MIXED, train=True, seed=3)
    assert loss == pytest.approx(wanted, rel=1e-4) and state == {}
    assert metrics["loss"][0] / metrics["loss"][1] == pytest.approx(wanted, rel=1e-4)
    assert loss_of(batch, MIXED)[0] == loss_of(batch)[0]
    assert loss_of(batch, MIXED, train=True, seed=4)[0] != loss


def test_examples_without_weight_do_not_count():
    """Faults: padding enters the loss; a black image, which stands for a malformed one, is mixed into an example."""
    batch = batch_of()
    batch["weight"][[1, 5]] = 0
    loss, (_, metrics) = loss_of(batch, MIXED, train=True)
    black = {name: array.copy() for name, array in batch.items()}
    for name in ("image", "label"):
        black[name][[1, 5]] = 0
    assert loss_of(black, MIXED, train=True)[0] == loss and metrics["loss"][1] == EXAMPLES - 2
    assert loss_of(jax.tree.map(np.zeros_like, batch), MIXED, train=True)[0] == 0


def test_a_step_on_a_mesh_gives_the_same():
    """Faults: mixup exchanges other neighbours on a mesh; an axis is named wrongly."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

    def step(params, batch):
        return jax.value_and_grad(lambda p: MIXED.loss(p, batch, key=jax.random.key(0), train=True)[0])(params)

    loss, gradient = quick_jit(step)(variables(), batch_of())
    with jax.set_mesh(mesh):
        again, on_mesh = quick_jit(step)(variables(), batch_of())
    assert again == pytest.approx(float(loss), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), on_mesh, gradient)
    axes = SMALL.logical_axes(variables())["params"]
    assert axes["layers"]["attention"]["query"]["kernel"] == ("layers", "embed", "heads", "kv")
    assert axes["patches"]["kernel"] == (None, "embed") == axes["registers"]
    assert axes["classifier"]["kernel"] == ("embed", "classes")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embed_dim": 20}, "embed_dim=20: must be divisible by task.heads=6; use 18"),
        ({"embed_dim": 18}, "embed_dim=18: must be divisible by the 4 parts of the positions"),
        ({"mixup": -0.1}, "mixup=-0.1"),
        ({"registers": -1}, "registers=-1"),
        ({"init_std": 0.0}, "init_std=0.0"),
        ({"pixel_std": (1.0,)}, "give each channel a value"),
        ({"attention": "flash"}, "'flash'"),
    ],
)
def test_fields_are_checked(fields, message):
    """Fault: an invalid value fails inside a trace."""
    with pytest.raises(ValueError, match=message):
        ViTTask(**fields)


def test_batches_that_do_not_fit_are_refused():
    """Faults: a patch crosses the border of the image; the last example has no neighbour; text ends in a KeyError."""
    with pytest.raises(ValueError, match="patch_size=16: must divide the sides 8 x 12 of an image; use 4"):
        ViTTask().init(jax.random.key(0), spec_of(batch_of()))
    with pytest.raises(ValueError, match="use an even number of examples, not 7"):
        MIXED.loss(variables(), batch_of(7), key=jax.random.key(0), train=True)
    with pytest.raises(ValueError, match=r"\['tokens'\] and no 'image'; ViTTask needs image data"):
        SMALL.init(jax.random.key(0), {"tokens": jax.ShapeDtypeStruct((2, 2), jnp.int32)})
