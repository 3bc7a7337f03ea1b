import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from shampax.framework.planning import flop_count
from shampax.models.lm import LMTask

X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
W = jax.ShapeDtypeStruct((16, 16), jnp.float32)
PRODUCT = 2 * 8 * 16 * 16


def test_loops_count_at_every_turn():
    """Fault: the body of a scan counts once, as the compiler counts it, or a loop around a solver multiplies."""

    def scanned(x, w):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=5)[0]

    def looped(x, w):
        return jax.lax.while_loop(lambda c: c.sum() < 0, lambda c: c @ w, x)

    def nested(x, w):
        return jax.lax.while_loop(lambda c: c.sum() < 0, lambda c: looped(c, w) @ w, x)

    assert flop_count.count(scanned, X, W, while_turns=7) == 5 * PRODUCT
    assert flop_count.count(looped, X, W, while_turns=7) == 7 * PRODUCT
    assert flop_count.count(nested, X, W, while_turns=7) == 8 * PRODUCT
    assert flop_count.count(jax.jit(scanned), X, W, while_turns=7) == 5 * PRODUCT


def test_the_longer_branch_counts():
    """Fault: branches of a condition are left out, or added up."""

    def either(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

    assert flop_count.count(either, X, W, while_turns=1) == 2 * PRODUCT


def test_parts_that_run_on_every_device_count_whole():
    """Fault: what runs per device is divided once more, or what is divided counts whole, by all axes or by some."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        some = jax.shard_map(
            lambda x: x @ x.T, axis_names={"x"}, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x")
        )
        assert flop_count.count(some, X, while_turns=1) == 2 * 4 * 4 * 16 / 2
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        own = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
        assert flop_count.count(own, X, while_turns=1) == 2 * 2 * 2 * 16
        assert flop_count.count(lambda x, w: x @ w, X, W, while_turns=1) == PRODUCT / 4


def test_convolutions():
    """Fault: the kernel's outputs count twice, its extent not at all, or padding like what is multiplied; groups."""
    x, kernel = jax.ShapeDtypeStruct((2, 8, 8, 6), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 10), jnp.float32)

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    # Of 4 outputs x 3 taps the last one reads beyond the end.
    assert flop_count.count(convolve, x, kernel, while_turns=1) == 2 * (2 * 10 * 3) * (4 * 3 - 1) ** 2


def test_gradients_of_strided_convolutions():
    """Fault: zeros between the inputs count like what is multiplied: four times the work of a stride of 2."""
    x, kernel = jax.ShapeDtypeStruct((2, 8, 8, 6), jnp.float32), jax.ShapeDtypeStruct((2, 2, 6, 10), jnp.float32)

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    gradient = jax.grad(lambda *both: convolve(*both).sum(), argnums=(0, 1))
    forward = 2 * (2 * 4 * 4 * 10) * (2 * 2 * 6)
    assert flop_count.count(convolve, x, kernel, while_turns=1) == forward
    assert flop_count.count(gradient, x, kernel, while_turns=1) == 3 * forward


def test_a_language_model_says_its_flops():
    """Fault: the task's own formula, which utilisation is computed from, has a part wrong."""
    task = LMTask(vocab_size=96, layers=3, embed_dim=32, heads=4, kv_heads=2, head_dim=8, mlp_dim=80)
    columns = ("tokens", "segments", "positions", "characters")
    batch = {name: jax.ShapeDtypeStruct((4, 65), jnp.int32) for name in columns}
    variables = jax.eval_shape(lambda: task.init(jax.random.key(0), batch))

    def gradient(variables, batch):
        def loss(variables):
            return task.loss(variables, batch, key=jax.random.key(0), train=True)[0]

        return jax.grad(loss)(variables)

    counted = flop_count.count(gradient, variables, batch, while_turns=1)
    assert counted == pytest.approx(task.flops(batch), rel=0.02)
