"""Programs of one device, and what is estimated from them, against what can be counted by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from shampax.framework.planning import device_program, flop_count, liveness, roofline
from shampax.framework.sharding.chips import Speeds

ROWS, WIDTH, LAYERS = 64, 128, 5
SQUARE = WIDTH * WIDTH * 4  # bytes
SPEEDS = Speeds(flops=1e12, memory=1e9, network=1e6)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:8])


def read(mesh, function, *arguments):
    """The program of `function(*arguments)`, each argument a shape and its PartitionSpec."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec)) for s, spec in arguments]
    with jax.set_mesh(mesh):
        return device_program.read(jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",)))


def layers(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def kinds(body):
    return [operation.kind for operation in body.operations]


def test_shapes_loops_and_collectives_are_those_of_a_device(mesh):
    """Fault: shapes are global, a loop counts once, or weights are not gathered where they are divided."""
    body = read(mesh, layers, ((ROWS, WIDTH), P(("data", "fsdp"))), ((LAYERS, WIDTH, WIDTH), P(None, "fsdp")))
    assert [value.shape for value in body.arguments] == [(8, WIDTH), (LAYERS, WIDTH // 2, WIDTH)]
    (loop,) = [operation for operation in body.operations if operation.kind == "while"]
    assert loop.turns == LAYERS
    work = roofline.work(body, SPEEDS, 1)
    assert work.flops == LAYERS * 2 * 8 * WIDTH * WIDTH
    assert work.traffic == {"all-gather": (LAYERS, LAYERS * SQUARE)}
    assert work.network_seconds == pytest.approx(LAYERS * SQUARE / 2 / SPEEDS.network)


@pytest.mark.parametrize(("axes", "group"), [("fsdp", 2), ("data", 4), (("data", "fsdp"), 8)])
def test_collectives_of_a_shard_map_are_among_the_devices_of_its_axes(mesh, axes, group):
    """Fault: the groups, which JAX writes as numbers of devices or as axes of a mesh, end a plan or are miscounted."""
    whole = jax.shard_map(lambda x: jax.lax.psum(x, axes), mesh=mesh, in_specs=P(axes), out_specs=P())
    body = read(mesh, whole, ((ROWS, WIDTH), P(axes)))
    assert [(each.kind, each.group) for each in body.operations if each.group > 1] == [("all-reduce", group)]


def test_a_sum_of_which_devices_keep_parts_is_a_reduce_scatter(mesh):
    """Fault: gradients are reduced whole on every device, in memory and on the network."""

    def gradient(x, y):
        return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x.T @ y, P()), P("fsdp"))

    body = read(mesh, gradient, ((ROWS, WIDTH), P(("data", "fsdp"))), ((ROWS, WIDTH), P(("data", "fsdp"))))
    found = [(each.kind, each.group, each.results[0].bytes) for each in body.operations if each.group > 1]
    assert found == [("reduce-scatter", 2, SQUARE // 2), ("all-reduce", 4, SQUARE // 2)]


def test_squares_are_divided_like_their_factors(mesh):
    """Fault: an operation that the partitioner has no rule for makes whole arrays of parts."""
    body = read(mesh, lambda x: jnp.square(x).sum(axis=1), ((ROWS, WIDTH), P(("data", "fsdp"))))
    assert [value.shape for each in body.operations for value in each.results if value.shape] == [(8, WIDTH), (8,)]


@pytest.mark.parametrize(
    ("shape", "times"),
    [((64, 128, 16, 64), 1), ((24, 64, 16, 64), 2), ((1025, 512), 1032 / 1025), ((24, 16), 16 / 3), ((7,), 1)],
)
def test_arrays_lie_in_the_tiles_that_fit_them_best(shape, times):
    """Fault: sides below 128 are held as they are, or padded though another side could lie along the tile."""
    assert device_program.tiled(shape, 4) == pytest.approx(times * 4 * math.prod(shape))


def test_equal_operations_are_one(mesh):
    """Fault: a product that is written twice is counted twice."""
    body = read(mesh, lambda x: (x @ x) + (x @ x).T, ((WIDTH, WIDTH), P()))
    assert kinds(body).count("dot_general") == 1


def test_convolutions_count_as_they_do_in_the_trace(mesh):
    """Fault: strides, padding or dilations of the program's text are misread."""

    def gradient(x, kernel):
        def out(x, kernel):
            return jax.lax.conv_general_dilated(
                x, kernel, (2, 1), ((1, 2), (3, 0)), rhs_dilation=(1, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        return jax.grad(lambda *both: (out(*both) ** 2).sum(), argnums=(0, 1))(x, kernel)

    shapes = (8, 9, 10, 6), (3, 2, 6, 5)
    body = read(mesh, gradient, *((shape, P()) for shape in shapes))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert roofline.work(body, None, 1).flops == flop_count.count(gradient, *arguments, while_turns=1)


def test_loops_of_unknown_length_run_as_assumed(mesh):
    """Fault: a solver's iterations count once."""

    def solve(x):
        return jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ x, x)

    body = read(mesh, solve, ((WIDTH, WIDTH), P()))
    assert roofline.work(body, None, 7).flops == 7 * 2 * WIDTH**3


def test_elementwise_work_takes_no_memory(mesh):
    """Fault: every intermediate of a chain is counted, or none is."""
    chain = read(mesh, lambda x: jnp.tanh(jnp.exp(x) * 2 + 1) @ x, ((WIDTH, WIDTH), P()))
    assert liveness.peak(chain) == 0  # the product goes where results go
    two = read(mesh, lambda x: jnp.tanh(x @ x) @ x, ((WIDTH, WIDTH), P()))
    assert liveness.peak(two) == SQUARE


def test_nothing_is_fused_into_a_scatter(mesh):
    """Fault: what is made only to be scattered takes no memory, or what has another shape takes it twice."""

    def scattered(x):
        updates = jnp.tanh(x).reshape(2 * WIDTH, WIDTH // 2)
        return jnp.zeros((WIDTH, WIDTH // 2)).at[np.arange(2 * WIDTH) % 7].add(updates)

    body = read(mesh, scattered, ((WIDTH, WIDTH), P()))
    indices = 4 * 2 * WIDTH
    assert SQUARE <= liveness.peak(body) <= SQUARE + 4 * indices


@pytest.mark.parametrize(("rows", "copies"), [(16, 0), (10, 1.6)])
def test_what_a_scatter_adds_lies_in_tiles_without_padding(mesh, rows, copies):
    """Fault: of rows that are no multiple of eight, 26 tables' in each example, the padded ones are not counted."""

    def scattered(x):
        return jnp.zeros((7, 128)).at[np.arange(64 * rows).reshape(64, rows) % 7].add(jnp.tanh(x))

    body = read(mesh, scattered, ((64, rows, 128), P()))
    updates, indices = 4 * 64 * rows * 128, 4 * 64 * rows
    assert (1 + copies) * updates <= liveness.peak(body) <= (1 + copies) * updates + 8 * indices


def test_a_sum_that_is_only_widened_is_kept_and_not_its_terms(mesh):
    """Fault: embeddings that are added up, and normalised in float32, are all kept for the backward pass."""

    def added(x):
        x = x.astype(jnp.bfloat16)
        wide = (x @ x + x.T @ x).astype(jnp.float32)
        product = (x * wide.sum(axis=1, keepdims=True).astype(x.dtype)) @ x
        return (wide * (product @ product)).sum(axis=0)

    half = SQUARE // 2
    body = read(mesh, added, ((WIDTH, WIDTH), P()))
    assert 3 * half <= liveness.peak(body) <= 3 * half + 4 * half // 8


def test_parameters_of_a_loop_are_converted_ahead(mesh):
    """Fault: weights are converted layer by layer, though the compiler converts, and keeps, those of all layers."""
    half = LAYERS * SQUARE // 2
    rows = 4 * ROWS * WIDTH

    def run(x, w, also):
        def layer(x, w):
            more = w.sum(0).astype(x.dtype) if also else 0
            return jnp.tanh(x @ w.astype(x.dtype)) + more, None

        x, _ = jax.lax.scan(layer, x.astype(jnp.bfloat16), w)
        return x.astype(jnp.float32)

    shapes = ((ROWS, WIDTH), P()), ((LAYERS, WIDTH, WIDTH), P())
    assert half <= liveness.peak(read(mesh, lambda x, w: run(x, w, False), *shapes)) <= half + 2 * rows
    assert liveness.peak(read(mesh, lambda x, w: run(x, w, True), *shapes)) <= 2 * rows + SQUARE


def test_what_the_backward_pass_reads_is_kept(mesh):
    """Fault: residuals of a scan are not counted, or recomputation does not save them."""

    def trained(block):
        def loss(x, w):
            return jax.lax.scan(lambda x, w: (block(x, w), None), x, w)[0].sum()

        return read(mesh, jax.grad(loss, argnums=1), ((ROWS, WIDTH), P()), ((LAYERS, WIDTH, WIDTH), P()))

    def block(x, w):
        for _ in range(4):
            x = jnp.tanh(x @ w)
        return x

    kept, again = liveness.peak(trained(block)), liveness.peak(trained(jax.checkpoint(block)))
    rows = ROWS * WIDTH * 4
    assert kept >= 4 * LAYERS * rows
    assert LAYERS * rows <= again < kept - 2 * LAYERS * rows


def test_a_slice_is_all_that_a_loop_reads_of_a_stack(mesh):
    """Fault: a loop over layers is charged with all layers at every turn."""
    body = read(mesh, layers, ((ROWS, WIDTH), P()), ((LAYERS, WIDTH, WIDTH), P()))
    read_and_written = LAYERS * (SQUARE + 2 * ROWS * WIDTH * 4)
    assert roofline.work(body, None, 1).memory_bytes == pytest.approx(read_and_written, rel=0.5)


def test_an_operation_takes_the_longer_of_its_products_and_its_bytes(mesh):
    """Fault: the two are added, or precision costs nothing."""
    fast = SPEEDS._replace(flops=1e30)
    slow = SPEEDS._replace(memory=1e30)

    def product(precision):
        return read(mesh, lambda x: jnp.dot(x, x, precision=precision), ((WIDTH, WIDTH), P()))

    default, highest = product("default"), product("highest")
    assert roofline.work(default, fast, 1).step_seconds == pytest.approx(2 * SQUARE / SPEEDS.memory)
    assert roofline.work(default, slow, 1).step_seconds == pytest.approx(2 * WIDTH**3 / SPEEDS.flops)
    assert roofline.work(highest, slow, 1).step_seconds == pytest.approx(6 * 2 * WIDTH**3 / SPEEDS.flops)
