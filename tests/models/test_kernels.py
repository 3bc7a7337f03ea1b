import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lm_cases import SMALL, batch_of, quick_jit, spec_of

from shampax.models import kernels
from shampax.models.attention import self_attention

AXES = ("data", "expert", "fsdp", "sequence", "tensor")


def mesh_of(**sizes):
    return jax.make_mesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * 5)


def abstract_mesh(platform, kind, **sizes):
    """Return a mesh whose devices exist nowhere."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    device = AbstractDevice(kind, None, platform)
    return jax.sharding.AbstractMesh(shape, AXES, (AxisType.Auto,) * 5, abstract_device=device)


@functools.cache
def inputs(length=256, head_dim=128):
    """Return queries, keys, values, weights of the result, and segments; 4 heads share 2 key-value heads."""
    random = np.random.default_rng(0)
    arrays = [random.normal(size=(4, length, heads, head_dim)).astype(np.float32) for heads in (4, 2, 2, 4)]
    segments = np.sort(random.integers(1, 5, (4, length)), axis=1).astype(np.int32)
    segments[:, -40:] = 0
    return (*arrays, segments)


def result_and_gradients(attention, mesh, dtype="float32"):
    """Return the result of `attention` and the gradients of its weighted sum on a mesh, as float32."""
    *arrays, weights, segments = inputs()

    def total(query, key, value):
        mixed = attention(query, key, value, segments).astype(jnp.float32)
        return (mixed * weights).sum(), mixed

    rows = NamedSharding(mesh, P(("data", "fsdp")))
    with jax.set_mesh(mesh):
        step = quick_jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True), in_shardings=rows)
        found = step(*(jax.device_put(jnp.asarray(x, dtype), rows) for x in arrays))
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(found)]


@functools.cache
def expected():
    """Return what XLA computes on one device."""
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    return result_and_gradients(functools.partial(self_attention, block=0), mesh)


def assert_agrees(found, tolerance):
    for x, y in zip(expected(), found, strict=True):
        assert np.linalg.norm(x - y) < tolerance * np.linalg.norm(x)


MESHES = {
    "data x fsdp x tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "data x sequence x tensor": {"data": 2, "sequence": 2, "tensor": 2},
}


@pytest.mark.parametrize(
    ("sizes", "dtype", "tolerance"),
    [
        pytest.param("data x fsdp x tensor", "float32", 1e-5),
        pytest.param("data x sequence x tensor", "float32", 1e-5, marks=pytest.mark.slow),
        pytest.param("data x fsdp x tensor", "bfloat16", 1e-2, marks=pytest.mark.slow),
    ],
)
def test_splash_attention_equals_xla(sizes, dtype, tolerance, monkeypatch):
    """Faults: documents see each other; heads share other keys; a device masks its queries as the first ones."""
    monkeypatch.setattr(kernels, "_BLOCK", 128)  # several blocks of queries and keys
    attention = functools.partial(self_attention, block=0, kernel="splash")
    assert_agrees(result_and_gradients(attention, mesh_of(**MESHES[sizes]), dtype), tolerance)


def test_what_cudnn_is_asked_for_equals_xla(monkeypatch):
    """Faults: documents see each other in cuDNN's mask; heads share other keys."""
    ask = jax.nn.dot_product_attention

    def by_xla(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return ask(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    assert_agrees(result_and_gradients(kernels.cudnn, mesh_of(**MESHES["data x fsdp x tensor"])), 1e-5)


CHOICES = [
    ("auto", ("cpu", "cpu"), {}, (2048, 128, "bfloat16"), "xla", "there is no kernel for platform cpu"),
    ("auto", ("tpu", "TPU v5 lite"), {}, (2048, 128, "bfloat16"), "splash", "it fits platform tpu"),
    ("auto", ("tpu", "TPU v5 lite"), {}, (2000, 128, "bfloat16"), "xla", "rows of 2000 positions on 1 devices"),
    ("auto", ("tpu", "TPU v5 lite"), {"sequence": 16}, (1024, 128, "bfloat16"), "xla", "must be multiples of 2048"),
    ("auto", ("tpu", "TPU v5 lite"), {}, (2048, 64, "bfloat16"), "xla", "head_dim=64 must be a multiple of 128"),
    ("auto", ("gpu", "NVIDIA H100"), {}, (2048, 128, "bfloat16"), "cudnn", "it fits platform gpu"),
    ("auto", ("gpu", "NVIDIA H100"), {}, (2048, 128, "float32"), "xla", "task.compute_dtype=float32 must be bfloat16"),
    ("auto", ("gpu", "NVIDIA H100"), {}, (2048, 256, "bfloat16"), "xla", "head_dim=256 must be a multiple of 8"),
    ("auto", ("gpu", "NVIDIA H100"), {}, (2040, 128, "bfloat16"), "xla", "must be multiples of 64"),
    ("auto", ("gpu", "NVIDIA H100"), {"sequence": 2}, (2048, 128, "bfloat16"), "xla", "along mesh.sequence"),
    ("auto", ("gpu", "AMD Instinct MI300X"), {}, (2048, 128, "bfloat16"), "xla", "it needs an NVIDIA GPU"),
    ("xla", ("tpu", "TPU v5 lite"), {}, (2048, 128, "bfloat16"), "xla", "configured"),
]


@pytest.mark.parametrize(("kernel", "device", "sizes", "shape", "chosen", "why"), CHOICES)
def test_auto_takes_the_kernel_that_fits(kernel, device, sizes, shape, chosen, why):
    """Fault: a run ends in an error of a kernel, or silently computes all scores on an accelerator."""
    with jax.sharding.use_abstract_mesh(abstract_mesh(*device, **sizes)):
        choice = kernels.choose(kernel, *shape)
    assert choice.kernel == chosen
    assert why in choice.why


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
