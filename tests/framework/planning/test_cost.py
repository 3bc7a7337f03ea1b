"""Compare the work that is read off small compiled programs with what they must compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shampax.framework.planning import cost, hlo
from shampax.framework.sharding.chips import Chip

CHIP = Chip(flops=1e6, float32=1e5, bandwidth=1e4, links=1e3, network=1e2, memory=1)
X = jax.ShapeDtypeStruct((64, 64), jnp.float32)


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def work(function, *arguments):
    return cost.judge(compiled(function, *arguments), CHIP)


def total(found):
    parts = list(found.parts.values())
    return sum(part.flops for part in parts), sum(part.bytes for part in parts)


def test_a_product():
    """Faults: the contracted axis is left out; an operand is not read, or read twice."""
    left, right = jax.ShapeDtypeStruct((8, 32), jnp.float32), jax.ShapeDtypeStruct((32, 16), jnp.float32)
    assert total(work(jnp.matmul, left, right)) == (2 * 8 * 32 * 16, 4 * (8 * 32 + 32 * 16 + 8 * 16))


def test_a_batch_of_products():
    """Fault: the axes of a batch count as contracted."""
    batch = jax.ShapeDtypeStruct((5, 8, 8), jnp.float32)
    assert total(work(jnp.matmul, batch, batch))[0] == 5 * 2 * 8**3


def test_a_convolution_counts_no_padding():
    """Fault: products with padding count, or channels do not."""
    images, kernel = jax.ShapeDtypeStruct((2, 9, 9, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 4), jnp.float32)

    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert total(work(convolve, images, kernel))[0] == 2 * 2 * 3 * 4 * (9 * 3 - 2) ** 2


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((8, 1, 8, 1, 1, 1, (0, 0)), 8),
        ((8, 3, 6, 1, 1, 1, (0, 0)), 18),
        ((8, 3, 4, 2, 1, 1, (1, 1)), 11),
        ((4, 1, 7, 1, 2, 1, (0, 0)), 4),  # three of seven results are gaps
        ((4, 4, 4, 3, 1, 4, (0, 0)), 4 + 3),  # a batch of four written as an axis
    ],
)
def test_the_taps_of_an_axis(window, expected):
    """Fault: a batch of products that a compiler writes as an axis counts as its square."""
    length, taps, results, stride, spread, apart, pad = window
    places = [(r * stride + t * apart - pad[0]) for r in range(results) for t in range(taps)]
    assert sum(p >= 0 and p % spread == 0 and p // spread < length for p in places) == cost._taps(*window)
    assert cost._taps(*window) == expected or window[4:6] == (1, 4)


def test_a_scan_counts_at_every_turn():
    """Fault: the body of a loop counts once, or the stack that it slices is read whole at every turn."""
    stack = jax.ShapeDtypeStruct((7, 64, 64), jnp.float32)

    def layers(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    flops, size = total(work(layers, X, stack))
    assert flops == 7 * 2 * 64**3
    once = 4 * 64 * 64
    assert 7 * 4 * once <= size <= 7 * 10 * once


LOOP = """HloModule loop

%condition (state: (s32[], f32[])) -> pred[] {
  %state = (s32[], f32[]) parameter(0)
  %turn = s32[] get-tuple-element(%state), index=0
  %last = s32[] constant(9)
  ROOT %less = pred[] compare(%turn, %last), direction=LT
}

%body (state.1: (s32[], f32[])) -> (s32[], f32[]) {
  %state.1 = (s32[], f32[]) parameter(0)
  ROOT %same = (s32[], f32[]) tuple(%state.1)
}

ENTRY %main (x: f32[], n: s32[]) -> (s32[], f32[]) {
  %x = f32[] parameter(0)
  %n = s32[] parameter(1)
  %first = s32[] constant(2)
  %start = (s32[], f32[]) tuple(%first, %x)
  ROOT %loop = (s32[], f32[]) while(%start), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        (LOOP, 7),
        (LOOP.replace("%last = s32[] constant(9)", "%last = s32[] get-tuple-element(%state), index=0"), None),
        (LOOP.replace("direction=LT", "direction=NE"), None),
        (LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'), 5),
    ],
)
def test_turns_are_read_off_the_condition(text, turns):
    """Faults: a loop that begins at 2 has two turns too many; one that ends by itself gets a number of turns."""
    module = hlo.parse(text)
    main = module.computations["main"]
    assert cost.trips(module, main["loop"], main) == turns


def test_an_unknown_number_of_turns_is_told():
    """Fault: a loop counts once and nobody learns it."""

    def until(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x @ x, x)

    found = work(until, X)
    assert found.flops == 2 * 64**3
    assert list(found.assumed) == ["loops whose turns the program does not tell run once"]


def test_a_loop_that_rarely_runs_is_free():
    """Fault: later rounds of an all-to-all count although even loads need none."""

    def until(x):
        with jax.named_scope("rarely"):
            return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x @ x, x)

    found = work(until, jax.ShapeDtypeStruct((72, 72), jnp.float32))
    assert not found.flops and not found.assumed


@pytest.mark.parametrize(("scope", "frequency", "n"), [("", 1, 64), ("5_in_50", 5 / 50, 67), ("rarely", 0, 66)])
def test_a_rare_branch_counts_at_its_frequency(scope, frequency, n):
    """Faults: work of one step in 50 counts at every step; the cheaper branch counts instead of the costlier one."""

    def refresh(due, x):
        return jax.lax.cond(due, lambda x: x @ x @ x, lambda x: x + 1, x)

    def step(due, x):
        if not scope:
            return refresh(due, x)
        with jax.named_scope(scope):
            return refresh(due, x)

    # Sizes differ because the cache of compiled programs ignores names.
    found = work(step, jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct((n, n), jnp.float32))
    assert found.flops == pytest.approx(frequency * 2 * 2 * n**3)


def test_collectives_are_counted_at_every_turn_and_between_slices():
    """Faults: a collective in a loop counts once; all of it seems to leave the slice."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",))
    rows = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=NamedSharding(mesh, P("x")))

    @jax.shard_map(mesh=mesh, in_specs=P("x"), out_specs=P(), check_vma=False)
    def sums(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(jax.lax.psum(x, "x")), x)

    text = compiled(sums, rows)
    one = cost.judge(text, CHIP).traffic["all-reduce"]
    size = 3 * 4 * 128
    assert (one.count, one.bytes, one.sent, one.crossing) == (3, size, size * 2 * 7 / 8, 0)
    assert one.seconds == pytest.approx(one.sent / CHIP.links)
    two = cost.judge(text, CHIP, islands=[0] * 4 + [1] * 4).traffic["all-reduce"]
    assert two.sent == one.sent
    assert two.crossing == size / 4  # each of four devices sends its quarter to the other slice and gets one back
    assert two.seconds == pytest.approx((two.sent - two.crossing) / CHIP.links + two.crossing / CHIP.network)


PRODUCT = """HloModule product

ENTRY %main (a: TYPE[64,64], b: TYPE[64,64]) -> TYPE[64,64] {
  %a = TYPE[64,64]{1,0} parameter(0)
  %b = TYPE[64,64]{1,0:S(1)} parameter(1)
  ROOT %c = TYPE[64,64]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}ATTRIBUTES
}
"""
HIGHEST = ", operand_precision={highest,highest}"


@pytest.mark.parametrize(
    ("dtype", "attributes", "tpu", "peak"),
    [
        ("bf16", HIGHEST, True, 1e6),
        ("f32", "", True, 1e6),
        ("f32", ", operand_precision={high,high}", True, 1e6 / 3),
        ("f32", HIGHEST, True, 1e5),
        ("f32", "", False, 1e6 / 2),
        ("f32", ", algorithm=dot_bf16_bf16_f32_x3", False, 1e6 / 3),
        ("f32", HIGHEST, False, 1e5),
    ],
)
def test_a_product_takes_the_peak_of_its_precision(dtype, attributes, tpu, peak):
    """Fault: the solver's products in full float32 seem as fast as those of the model."""
    text = PRODUCT.replace("TYPE", dtype).replace("ATTRIBUTES", attributes)
    part = cost.judge(text, CHIP, tpu=tpu).parts["other"]
    assert part.product_seconds == pytest.approx(2 * 64**3 / peak)
    assert part.seconds == max(part.product_seconds, part.bytes / CHIP.bandwidth)
    assert part.bytes == 2 * 64 * 64 * (2 if dtype == "bf16" else 4)  # one operand is in VMEM


KERNEL = """HloModule kernel

ENTRY %main (a: bf16[4,256,128]) -> bf16[4,256,128] {
  %a = bf16[4,256,128]{2,1,0} parameter(0)
  ROOT %kernel.1 = bf16[4,256,128]{2,1,0} custom-call(%a), custom_call_target="tpu_custom_call", attributes={x={
"y": 1}}, metadata={op_name="jit(f)/attention/my_kernel"}
}
"""


def test_kernels_take_the_formula_of_the_task():
    """Faults: a kernel has no FLOPs and nobody learns it; a task's formula is not asked."""
    unknown = cost.judge(KERNEL, CHIP)
    assert unknown.flops == 0
    assert list(unknown.assumed) == ["the kernel tpu_custom_call (kernel.1) has no FLOPs"]
    seen = []

    def formula(name, operands, results):
        seen.append((name, operands, results))
        return 3e9, 7e9

    found = cost.judge(KERNEL, CHIP, kernel=formula)
    assert found.parts == {"attention": cost.Part(7e9 / 1e4, 3e9 / 1e6, 3e9, 7e9)}
    array = jax.ShapeDtypeStruct((4, 256, 128), jnp.bfloat16)
    assert seen == [("tpu_custom_call jit(f)/attention/my_kernel kernel.1", [array], [array])]
    assert not found.assumed


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("jit(train_step)/jvp(Transformer)/while/body/layers/attention.project/out/dot_general", "attention"),
        ("jit(train_step)/transpose(jvp(Transformer))/while/body/layers/mlp/up/dot_general", "MLP"),
        ("jit(train_step)/jvp(Transformer)/bte,ve->btv/dot_general", "embedding, head and loss"),
        ("jit(train_step)/shard_map/dot_general", "optimizer"),
        ("jit(train_step)/shard_map/while/body/dot_general", "optimizer"),
        ("jit(train_step)/jvp(Transformer)/while/body/add", "other"),
        ("jit(eval_step)/reduce_sum", "other"),
        ("", "other"),
    ],
)
def test_classes(name, part):
    """Fault: the optimizer's work is shown as the model's."""
    text = PRODUCT.replace("TYPE", "f32").replace("ATTRIBUTES", f', metadata={{op_name="{name}"}}')
    assert list(cost.judge(text, CHIP).parts) == [part]
