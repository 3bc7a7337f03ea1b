import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lm_cases import SMALL, batch_of, quick_jit, spec_of
from traced import equations

from shampax.models import layout
from shampax.models.attention import attention
from shampax.models.bert import BertTask
from shampax.models.kernels import attention as kernels
from shampax.models.translation import TranslationTask

AXES = ("data", "expert", "fsdp", "sequence", "tensor")


def mesh_of(**sizes):
    return jax.make_mesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * 5)


def abstract_mesh(platform, kind, **sizes):
    """Return a mesh whose devices exist nowhere."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    device = AbstractDevice(kind, None, platform)
    return jax.sharding.AbstractMesh(shape, AXES, (AxisType.Auto,) * 5, abstract_device=device)


@functools.cache
def inputs(length=256, value_dim=64):
    """Return queries, keys, values, weights of the result, and segments; 4 heads share 2 key-value heads."""
    random = np.random.default_rng(0)
    shapes = [(4, length, heads, width) for heads, width in ((4, 64), (2, 64), (2, value_dim), (4, value_dim))]
    arrays = [random.normal(size=shape).astype(np.float32) for shape in shapes]
    segments = np.sort(random.integers(1, 5, (4, length)), axis=1).astype(np.int32)
    segments[:, -40:] = 0
    return (*arrays, segments)


@functools.cache
def known(pattern, length=256, sinks=None, value_dim=64):
    """Return the result and the gradients of its weighted sum for queries, keys, values and sinks, in float64."""
    *arrays, weights, segments = (x.astype(np.float64) for x in inputs(length, value_dim))
    query, key, value = arrays[0], *(np.repeat(x, 2, axis=2) for x in arrays[1:])
    slots, scale = np.arange(length), pattern.scale or query.shape[-1] ** -0.5
    distance = slots[:, None] - slots
    visible = segments[:, :, None] == segments[:, None, :]
    if pattern.causal:
        visible &= (distance >= 0) & (distance < (pattern.window or length))
    scores = np.einsum("bthd,bshd->bhts", query, key) * scale
    bent = np.tanh(scores / pattern.soft_cap) if pattern.soft_cap else np.zeros(())
    scores = pattern.soft_cap * bent if pattern.soft_cap else scores
    shares = np.where(visible[:, None], np.exp(scores - scores.max()), 0)
    of_sinks = 0 if sinks is None else np.exp(np.array(sinks)[:, None, None] - scores.max())
    total = shares.sum(axis=-1, keepdims=True) + of_sinks
    shares /= total
    by_share = np.einsum("bthd,bshd->bhts", weights, value)
    by_score = shares * (by_share - (shares * by_share).sum(axis=-1, keepdims=True)) * (1 - bent**2) * scale
    of_keys = np.einsum("bhts,bthd->bshd", by_score, query), np.einsum("bhts,bthd->bshd", shares, weights)
    of_keys = (x.reshape(*x.shape[:2], 2, 2, -1).sum(axis=3) for x in of_keys)
    mixed = np.einsum("bhts,bshd->bthd", shares, value)
    lost = () if sinks is None else [-(of_sinks / total * (shares * by_share).sum(-1, keepdims=True)).sum((0, 2, 3))]
    return [np.einsum("bhts,bshd->bthd", by_score, key), *of_keys, *lost, mixed]


def assert_is_known(pattern, mesh, *, dtype="float32", length=256, sinks=None, value_dim=64, **knobs):
    """Compare with `known` the result of attention, and the gradients of its weighted sum, on a mesh."""
    *arrays, weights, segments = inputs(length, value_dim)

    def total(*arrays):
        inputs = (layout.zigzag(jnp.asarray(x)) for x in (*arrays[:3], segments))
        own = {"sinks": arrays[3]} if sinks else {}
        mixed = layout.natural(attention(*inputs, pattern=pattern, zigzag=True, **own, **knobs)).astype(jnp.float32)
        return (mixed * weights).sum(), mixed

    rows = NamedSharding(mesh, P(("data", "fsdp")))
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(jnp.asarray(x, dtype), rows) for x in arrays]
        arrays += [jax.device_put(jnp.array(sinks), NamedSharding(mesh, P()))] if sinks else []
        found = quick_jit(jax.grad(total, argnums=tuple(range(len(arrays))), has_aux=True))(*arrays)
    for x, y in zip(known(pattern, length, sinks, value_dim), jax.tree.leaves(found), strict=True):
        assert np.linalg.norm(x - np.asarray(y, np.float64)) < TOLERANCES[dtype] * np.linalg.norm(x)


TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}
MESHES = {
    "alone": {},
    "data x fsdp x tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "data x sequence x tensor": {"data": 2, "sequence": 2, "tensor": 2},
}
CAUSAL = kernels.Pattern()
BENT = kernels.Pattern(window=70, soft_cap=2.0, scale=0.2)
TWO_WAYS = kernels.Pattern(causal=False)


@pytest.mark.parametrize(
    ("pattern", "sizes", "block"),
    [
        (CAUSAL, "alone", 0),
        (CAUSAL, "alone", 32),
        (BENT, "alone", 0),
        (TWO_WAYS, "alone", 32),
        (BENT, "data x sequence x tensor", 0),
        (BENT, "data x sequence x tensor", 32),
        pytest.param(CAUSAL, "data x sequence x tensor", 32, marks=pytest.mark.slow),
        pytest.param(TWO_WAYS, "data x sequence x tensor", 32, marks=pytest.mark.slow),
    ],
)
def test_attention_by_xla(pattern, sizes, block):
    """Faults: a wrong window, soft cap or slice of the keys; chunks of the zigzag order are mixed up."""
    assert_is_known(pattern, mesh_of(**MESHES[sizes]), block=block)


SINKS = (1.0, -1.0, 5.0, 0.0)


@pytest.mark.parametrize(("kernel", "block"), [("xla", 32), ("splash", 0)])
def test_sinks(kernel, block, monkeypatch):
    """Faults: a head has the sink of another; a device's gradient of sinks is not summed; masked keys get weight."""
    monkeypatch.setattr(kernels, "_BLOCK", 128)
    mesh, length = MESHES["data x sequence x tensor"], 256 if kernel == "xla" else 512
    assert_is_known(BENT, mesh_of(**mesh), length=length, sinks=SINKS, kernel=kernel, block=block)


@pytest.mark.parametrize(
    ("pattern", "sizes", "dtype"),
    [
        pytest.param(CAUSAL, "data x fsdp x tensor", "float32"),
        pytest.param(BENT, "data x fsdp x tensor", "float32", marks=pytest.mark.slow),
        pytest.param(BENT, "data x fsdp x tensor", "bfloat16", marks=pytest.mark.slow),
        pytest.param(TWO_WAYS, "data x fsdp x tensor", "float32", marks=pytest.mark.slow),
        pytest.param(CAUSAL, "data x sequence x tensor", "float32", marks=pytest.mark.slow),
        pytest.param(TWO_WAYS, "data x sequence x tensor", "float32", marks=pytest.mark.slow),
    ],
)
def test_splash_attention(pattern, sizes, dtype, monkeypatch):
    """Faults: documents see each other; heads share other keys; a device masks its queries as the first ones."""
    monkeypatch.setattr(kernels, "_BLOCK", 128)  # several blocks of queries and keys
    length = 512 if "sequence" in sizes else 256  # zigzag chunks of a block
    assert_is_known(pattern, mesh_of(**MESHES[sizes]), dtype=dtype, length=length, kernel="splash")


@pytest.mark.parametrize(
    ("kernel", "sizes"),
    [("xla", "data x sequence x tensor"), pytest.param("splash", "data x fsdp x tensor", marks=pytest.mark.slow)],
)
def test_values_of_another_width(kernel, sizes):
    """Faults: the result is cut like the queries; the scale comes from the width of values."""
    assert_is_known(CAUSAL, mesh_of(**MESHES[sizes]), value_dim=128, kernel=kernel, block=32)


def test_splash_attention_of_one_replica(monkeypatch):
    """Fault: gradients that are added up by each replica, inside a `shard_map`, cannot use the kernel."""
    whole = attention

    def of_replica(*inputs, **knobs):
        part, rows = functools.partial(whole, **knobs), P("data")
        return jax.shard_map(part, axis_names={"data"}, in_specs=rows, out_specs=rows, check_vma=False)(*inputs)

    monkeypatch.setitem(globals(), "attention", of_replica)
    assert_is_known(CAUSAL, mesh_of(data=2, fsdp=2), kernel="splash")


def pretend_cudnn(monkeypatch, error=None):
    """Compute what cuDNN is asked for by XLA, or raise an error as JAX does where cuDNN does not fit."""
    ask = jax.nn.dot_product_attention

    def by_xla(*arrays, implementation, **options):
        assert implementation == "cudnn"
        if error:
            raise error
        return ask(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)


@pytest.mark.parametrize(
    "pattern", [CAUSAL, kernels.Pattern(window=70, scale=0.2), TWO_WAYS], ids=["causal", "window", "two ways"]
)
def test_what_cudnn_is_asked_for(pattern, monkeypatch):
    """Faults: documents see each other in cuDNN's mask; heads share other keys; the window is ignored."""
    pretend_cudnn(monkeypatch)
    monkeypatch.setattr(kernels, "choose", lambda *_, **__: kernels.Choice("cudnn", "for this test"))
    assert_is_known(pattern, mesh_of(**MESHES["data x fsdp x tensor"]))


V5E, H100 = ("tpu", "TPU v5 lite"), ("gpu", "NVIDIA H100")
CAPPED = kernels.Pattern(soft_cap=50.0)
CHOICES = [
    ("auto", ("cpu", "cpu"), {}, (2048, 128, "bfloat16"), "xla", "there is no kernel for platform cpu"),
    ("auto", V5E, {}, (2048, 128, "bfloat16"), "splash", "it fits platform tpu"),
    ("auto", V5E, {}, (2048, 128, "bfloat16", CAPPED), "splash", "it fits platform tpu"),
    ("auto", V5E, {}, (2000, 128, "bfloat16"), "xla", "rows of 2000 positions on 1 devices"),
    ("auto", V5E, {"sequence": 16}, (1024, 128, "bfloat16"), "xla", "must be multiples of 2048"),
    ("auto", V5E, {}, (2048, 96, "bfloat16"), "xla", "head_dim=96 must be a multiple of 64"),
    ("auto", V5E, {}, (2048, 128, "bfloat16", CAUSAL, True), "xla", "it cannot drop weights"),
    ("auto", H100, {}, (2048, 128, "bfloat16"), "cudnn", "it fits platform gpu"),
    ("auto", H100, {}, (2048, 128, "bfloat16", CAPPED), "xla", "it has no soft cap of scores, and soft_cap=50"),
    ("auto", H100, {}, (2048, 128, "bfloat16", CAUSAL, False, True), "xla", "it has no sinks"),
    ("auto", V5E, {}, (2048, 128, "bfloat16", CAUSAL, False, True), "splash", "it fits platform tpu"),
    ("auto", V5E, {}, (2048, 128, "bfloat16", CAUSAL, False, False, 96), "xla", "head_dim=96 must be a multiple"),
    ("auto", V5E, {}, (2048, 192, "bfloat16", CAUSAL, False, False, 128), "splash", "it fits platform tpu"),
    ("auto", H100, {}, (2048, 128, "bfloat16", CAUSAL, False, False, 64), "xla", "have 64 and 128"),
    ("auto", H100, {}, (2048, 128, "float32"), "xla", "task.compute_dtype=float32 must be bfloat16"),
    ("auto", H100, {}, (2048, 256, "bfloat16"), "xla", "head_dim=256 must be a multiple of 8"),
    ("auto", H100, {}, (2040, 128, "bfloat16"), "xla", "must be multiples of 64"),
    ("auto", H100, {"sequence": 2}, (2048, 128, "bfloat16"), "xla", "along mesh.sequence"),
    ("auto", ("gpu", "AMD Instinct MI300X"), {}, (2048, 128, "bfloat16"), "xla", "it needs an NVIDIA GPU"),
    ("xla", V5E, {}, (2048, 128, "bfloat16"), "xla", "configured"),
]


def choose(kernel, length, head_dim, dtype, pattern=CAUSAL, drops=False, sinks=False, value_dim=0):
    query = jax.ShapeDtypeStruct((4, length, 4, head_dim), jnp.dtype(dtype))
    return kernels.choose(kernel, query, length, 2, pattern, drops=drops, sinks=sinks, value_dim=value_dim)


@pytest.mark.parametrize(("kernel", "device", "sizes", "shape", "chosen", "why"), CHOICES)
def test_auto_takes_the_kernel_that_fits(kernel, device, sizes, shape, chosen, why, monkeypatch):
    """Fault: a run ends in an error of a kernel, or silently computes all scores on an accelerator."""
    pretend_cudnn(monkeypatch)
    with jax.sharding.use_abstract_mesh(abstract_mesh(*device, **sizes)):
        choice = choose(kernel, *shape)
    assert choice.kernel == chosen
    assert why in choice.why


def test_auto_does_not_take_a_cudnn_that_jax_refuses(monkeypatch):
    """Fault: a run ends in JAX's error about the version of cuDNN."""
    pretend_cudnn(monkeypatch, RuntimeError("cuDNN is\nnot detected."))
    with jax.sharding.use_abstract_mesh(abstract_mesh(*H100)):
        choice = choose("auto", 2048, 128, "bfloat16")
    assert choice == ("xla", "cudnn does not fit: JAX says 'cuDNN is not detected.'")


def test_a_named_kernel_that_does_not_fit_is_refused():
    """Fault: the user measures XLA's attention in the belief that it is the kernel."""
    batch = spec_of(batch_of())
    for kernel, device, message in (
        ("splash", ("cpu", "cpu"), r"task.attention='splash': rows of 16 positions on 1 devices must be multiples of"),
        ("splash", ("gpu", "NVIDIA H100"), r"'splash': it needs a TPU and has platform gpu. Use 'auto' or 'xla'"),
        ("cudnn", ("tpu", "TPU v4"), r"task.attention='cudnn': it needs an NVIDIA GPU and has TPU v4. Use 'auto' or"),
    ):
        task = dataclasses.replace(SMALL, attention=kernel)
        with (
            jax.sharding.use_abstract_mesh(abstract_mesh(*device)),
            pytest.raises(ValueError, match=message),
        ):
            task.check_batch(batch)


def test_the_kernel_is_noted():
    """Fault: nobody learns which kernel `auto` chose."""
    with jax.set_mesh(mesh_of()):
        notes = SMALL.notes(spec_of(batch_of()))
    assert notes == ("attention: xla (there is no kernel for platform cpu)",)


def test_models_ask_for_the_kernel_in_training():
    """Fault: BERT and translation compute all scores where a kernel fits."""
    segments = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    bert = BertTask(max_length=128, embed_dim=128, heads=2, dropout=0.0, attention="splash")
    masked = {name: jax.ShapeDtypeStruct((2, 4), jnp.int32) for name in ("masked_positions", "masked_tokens")}
    pairs = {
        f"{side}{part}": jax.ShapeDtypeStruct((2, 128 + (side == "target")), jnp.int32)
        for side in ("source", "target")
        for part in ("", "_segments", "_positions")
    }
    translation = TranslationTask(head_dim=64, attention="splash")
    is_next = jax.ShapeDtypeStruct((2,), jnp.int32)
    for task, batch, calls in (
        (bert, {"tokens": segments, "segments": segments, "is_next": is_next, **masked}, 1),
        (translation, pairs, 3),
    ):
        with jax.set_mesh(mesh_of()):
            abstract = jax.eval_shape(task.init, jax.random.key(0), batch)
            loss = functools.partial(task.loss, key=jax.random.key(0), train=True)
            found = jax.make_jaxpr(loss)(abstract, batch)
            assert [": splash (configured)" in note for note in task.notes(batch)] == [True] * calls
        assert sum(each.primitive.name == "pallas_call" for each in equations(found.jaxpr)) == calls
