"""Test the cost of a step per device: program size, FLOPs, memory, padding and traffic; and that layouts give the same
results."""

import contextlib
import dataclasses
import functools
import itertools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from shampax.configs import lm
from shampax.framework.planning import collectives
from shampax.models.lm import LMTask
from shampax.optimizers import ShampooOptions, distributed_shampoo
from shampax.optimizers.baselines import AdamWOptions
from shampax.optimizers.plan.blocks import make_plan, parameters

OPTIONS = ShampooOptions(block_size=128, interval=20, early_intervals=(), solver="newton")
# The options that tests/conftest.py turns off for all other programs.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}

LAYOUTS = {
    # mesh, specs of the parameters, width of the Transformer, its layers
    "replicated on 8": ({"data": 8}, programs.replicated, 512, 2),
    "fsdp on 8": ({"fsdp": 8}, programs.fsdp, 512, 2),
    "fsdp x tensor on 8": ({"fsdp": 4, "tensor": 2}, programs.fsdp_tensor, 512, 2),
    "data x fsdp x tensor on 8": ({"data": 2, "fsdp": 2, "tensor": 2}, programs.fsdp_tensor, 512, 2),
    # 768 rows are 6 blocks of 128.
    "replicated on 6": ({"data": 6}, programs.replicated, 768, 1),
    "fsdp x tensor on 6": ({"fsdp": 3, "tensor": 2}, programs.fsdp_tensor, 768, 1),
    "fsdp on 3": ({"fsdp": 3}, programs.fsdp, 768, 1),
}
# One that shards over two axes, one with copies, one that its devices do not divide.
FAST_LAYOUTS = ("fsdp x tensor on 8", "data x fsdp x tensor on 8", "replicated on 6")


def lower(layout, layers):
    """Lower one optimizer step of a Transformer of unscanned layers for a layout."""
    axes, specs, width, _ = LAYOUTS[layout]
    return programs.lower_shampoo(programs.transformer(layers, width), programs.mesh_of(**axes), specs, OPTIONS)


@functools.cache
def compiled(layout, layers):
    """Return (text of the program, CPU seconds to compile it). Other processes do not change CPU seconds."""
    lowered = lower(layout, layers).lowered
    start = time.process_time()
    program = lowered.compile()
    return program.as_text(), time.process_time() - start


def operations(step):
    text = step.lowered.as_text()
    return text.count("dot_general"), text.count("stablehlo.while")


def test_the_number_of_products_does_not_depend_on_layers():
    """Fault: a Python loop over parameters, layers, blocks or owners contains a product or a solver."""
    seen = {layers: operations(lower("fsdp x tensor on 8", layers)) for layers in (2, 16)}
    for layers in (2, 16):
        shapes, names = programs.scanned_transformer(layers, 512)
        step = programs.lower_shampoo(shapes, programs.mesh_of(data=8), programs.replicated, OPTIONS, names=names)
        seen[f"{layers} scanned"] = operations(step)
    assert len(set(seen.values())) == 1 and min(seen[2]) > 0, seen


@pytest.mark.parametrize("layout", ["fsdp x tensor on 8", pytest.param("replicated on 8", marks=pytest.mark.slow)])
def test_program_size_is_not_proportional_to_layers(layout):
    """Fault: there are instructions for every block or pair of parameters.

    Parameters that are not scanned cost a few instructions each; the mathematics is there once.
    """
    (small, small_seconds), (large, large_seconds) = compiled(layout, 2), compiled(layout, 16)
    assert len(large.splitlines()) <= 2.5 * len(small.splitlines())
    assert large_seconds <= 2.5 * small_seconds


# Name -> (shapes, blocks of 128 x 128, interval, options of the compiler). The large one is compiled as users do.
MODELS = {
    "776 blocks": (programs.transformer(4, 512) | {"projection": (512, 256)}, 776, 20, OPTIMIZED),
    "64 blocks": ({"square": (1024, 1024)}, 64, 4, {}),
}


def phases_of(model):
    _, blocks, interval, _ = MODELS[model]
    return min(interval, blocks // 8)


@functools.cache
def step_of(model, devices):
    shapes, blocks, interval, _ = MODELS[model]
    mesh = programs.mesh_of(data=devices) if devices > 1 else None
    options = dataclasses.replace(OPTIONS, interval=interval, phases=phases_of(model))  # as many on 8 devices as on one
    step = programs.lower_shampoo(shapes, mesh, programs.replicated, options)
    assert [bucket.blocks for bucket in step.tx.layout(step.params).plan.buckets] == [blocks]
    return step


@functools.cache
def program_of(model, devices):
    """Return (program, CPU seconds to compile it)."""
    lowered = step_of(model, devices).lowered
    start = time.process_time()
    program = lowered.compile(compiler_options=MODELS[model][-1])
    return program, time.process_time() - start


@pytest.mark.slow
def test_776_blocks_compile_in_seconds():
    """Fault: the size of the program is linear in the blocks. Another implementation with this fault needs 107 s, this
    one 5 s."""
    _, seconds = program_of("776 blocks", 8)
    assert seconds < 20


@pytest.mark.parametrize("model", ["64 blocks", pytest.param("776 blocks", marks=pytest.mark.slow)])
def test_each_of_8_devices_has_an_eighth_of_the_work_and_of_the_memory(model):
    """Faults: devices repeat statistics, roots or products; a device has more due blocks than others, which wait.

    XLA counts the body of a loop once, on one device as on eight.
    """
    _, blocks, *_ = MODELS[model]
    alone, shared = step_of(model, 1), step_of(model, 8)
    both = [program_of(model, devices)[0] for devices in (1, 8)]
    flops = [program.cost_analysis()["flops"] for program in both]
    assert flops[0] > blocks * 8 * 128**3  # includes the four products with each block
    scratch = [program.memory_analysis().temp_size_in_bytes for program in both]
    state = [programs.device_bytes(step.state) for step in (alone, shared)]
    for on_one, on_each in (flops, state):
        assert on_each <= 1.15 * on_one / 8
    # An exchange holds the blocks that leave and those that arrive, a solver about 8 matrices for each due one. On one
    # device the solver needs less than the rest of the step.
    due = 2 * math.ceil(blocks / 8 / phases_of(model))
    assert scratch[1] <= 1.15 * scratch[0] / 8 + 2 * 4 * blocks / 8 * 128**2 + 8 * 4 * due * 128**2
    due = (
        shared.tx.layout(shared.params).plan.buckets[0].due
    )  # [devices, phases, maximum blocks of a device in a phase]
    assert due.shape[2] <= 1.15 * blocks / phases_of(model) / 8


def language_model(variant):
    """Return (shapes, axis names) of a shipped config at full size."""
    fields = lm.get_config(variant).task.to_dict()
    del fields["name"]
    task = LMTask(**fields)
    batch = {"tokens": jax.ShapeDtypeStruct((1, 2), jnp.int32)}
    variables = jax.eval_shape(lambda key: task.init(key, batch), jax.random.key(0))
    return variables["params"], task.logical_axes(variables)["params"]


def attention_and_mlp(prefix, attentions=("self",)):
    """Return a Transformer layer of width 1024 with 16 heads."""
    shapes = {f"{prefix}/up": (1024, 4096), f"{prefix}/down": (4096, 1024)}
    for attention in attentions:
        shapes |= {f"{prefix}/{attention}/{kind}": (1024, 16, 64) for kind in ("query", "key", "value")}
        shapes[f"{prefix}/{attention}/out"] = (16, 64, 1024)
    return shapes


def transformer_big():
    """Return WMT's Transformer, arXiv 1706.03762, table 3."""
    shapes = {"embedding": (32_768, 1024)}
    for layer in range(6):
        shapes |= attention_and_mlp(f"encoder/{layer}") | attention_and_mlp(f"decoder/{layer}", ("self", "cross"))
    return shapes


def bert_large():
    shapes = {"embedding": (30_522, 1024), "pooler": (1024, 1024), "transform": (1024, 1024), "next": (1024, 2)}
    for layer in range(24):
        shapes |= attention_and_mlp(f"encoder/{layer}")
    return shapes


def dlrm():
    """Return MLPerf's DLRM on Criteo; its tables are diagonal."""
    layers = {"bottom": (13, 512, 256, 128), "top": (479, 1024, 1024, 512, 256, 1)}
    return {
        f"{name}/{i}": shape for name, widths in layers.items() for i, shape in enumerate(itertools.pairwise(widths))
    }


def resnet_50():
    shapes, channels = {"stem": (7, 7, 3, 64), "head": (2048, 1000)}, 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            name = f"{stage}/{block}"
            shapes |= {f"{name}/a": (1, 1, channels, width), f"{name}/b": (3, 3, width, width)}
            shapes[f"{name}/c"] = (1, 1, width, 4 * width)
            if block == 0:
                shapes[f"{name}/shortcut"] = (1, 1, channels, 4 * width)
            channels = 4 * width
    return shapes


def named(shapes):
    """Return (ShapeDtypeStructs, axis names)."""
    kinds = {"query": ("embed", "heads", "kv"), "out": ("heads", "kv", "embed")}
    kinds["key"] = kinds["value"] = kinds["query"]
    names = {name: kinds.get(name.split("/")[-1], (None,) * len(shape)) for name, shape in shapes.items()}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}, names


WORKLOADS = {
    "language model 1b": lambda: language_model("1b"),
    "language model 8b": lambda: language_model("8b"),
    "Transformer-big": lambda: named(transformer_big()),
    "BERT-large": lambda: named(bert_large()),
    "DLRM": lambda: named(dlrm()),
    "ResNet-50": lambda: named(resnet_50()),
}


def cost(sizes):
    """Return (FLOPs, elements of state) of blocks with sizes [n, 2], each up to a constant factor."""
    r, c = np.asarray(sizes, np.float64).T
    return np.array([np.sum(r * c * (r + c) + r**3 + c**3), np.sum(r**2 + c**2 + 2 * r * c)])


@pytest.mark.parametrize("block_size", [128, 1024])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_padding_wastes_at_most_a_quarter(workload, block_size):
    """Faults: cuts leave slivers; sides are rounded up much to have few buckets.

    Empty slots count at block size 128, where even the smallest workload has enough blocks for 8 devices.
    """
    params, names = WORKLOADS[workload]()
    plan = make_plan(parameters(params, names), ShampooOptions(block_size=block_size), {"data": 8})
    real = padded = with_empty_slots = np.zeros(2)
    for bucket in plan.buckets:
        block = cost([bucket.shape])
        filled = bucket.slots.reshape(-1) < bucket.blocks
        real = real + cost(bucket.real_sizes[filled])
        padded = padded + bucket.blocks * block
        with_empty_slots = with_empty_slots + bucket.slots.size * block
    assert np.all(padded <= 1.25 * real)
    assert block_size > 128 or np.all(with_empty_slots <= 1.25 * real)
    assert len(plan.buckets) <= 16


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=() if name in FAST_LAYOUTS else pytest.mark.slow) for name in LAYOUTS],
)
def test_traffic_beyond_the_baseline(layout):
    """Faults: blocks are joined; parameters are gathered; a solver uses collectives; all-to-alls are mostly padding.

    The baseline, AdamW, needs no collective. The updates of replicated parameters must also be gathered over the
    devices with copies; no assignment of the work avoids that.
    """
    axes, _, width, layers = LAYOUTS[layout]
    text, _ = compiled(layout, layers)
    found = collectives.find(text)
    whole = sum(4 * np.prod(shape) for shape in programs.transformer(layers, width).values())
    part = whole / np.prod(list(axes.values()))
    assert [c.kind for c in found].count("all-to-all") == 2  # one bucket
    assert programs.total(found, "all-to-all") <= 2.5 * part
    shards = np.prod([size for name, size in axes.items() if name != "data"])
    gathered = whole / shards if "data" in axes else 0
    assert gathered <= programs.total(found, "all-gather") <= 1.01 * gathered
    assert programs.total(found, "all-reduce", "reduce-scatter", "collective-permute") <= 0.01 * part
    inside = programs.inside_loops(text)
    assert inside and not programs.communicates(inside)


def test_the_baseline_has_no_traffic():
    """Fault: the test above counts nothing. Here it must find no traffic."""
    mesh = programs.mesh_of(fsdp=4, tensor=2)
    params = programs.structs(programs.transformer(1, 512), mesh, programs.fsdp_tensor)
    text = programs.lower_step(AdamWOptions().build(0.01), params, mesh).lowered.compile().as_text()
    assert not collectives.find(text)


def test_updates_do_not_depend_on_shardings():
    """Fault: tiles are split, sent, joined or returned in another order than that of the blocks."""
    shapes_and_specs = {
        "matrix": ((64, 32), ("fsdp", "tensor")),
        "transposed": ((32, 64), (None, ("tensor", "fsdp"))),
        "heads": ((32, 8, 8), ("fsdp", "tensor", None)),
        "heads out": ((8, 8, 32), ("tensor", None, "fsdp")),
        "head dim": ((32, 4, 16), (None, None, "fsdp")),
        "conv": ((3, 3, 16, 32), (None, None, "fsdp", "tensor")),
        "layers": ((4, 32, 64), (None, "fsdp", "tensor")),
        "layers over devices": ((4, 32, 32), ("fsdp", None, "tensor")),
        "odd": ((33, 65), ("fsdp", "tensor")),  # neither side divides
        "misfit": ((172, 32), ("fsdp", "tensor")),  # shards of 43 rows, blocks of 32
        "bias": ((64,), ("fsdp",)),
    }
    axis_names = {
        "heads": ("embed", "heads", "head_dim"),
        "heads out": ("heads", "head_dim", "embed"),
        "head dim": ("embed", "heads", "head_dim"),
        "layers": ("layers", "in", "out"),
        "layers over devices": ("layers", "in", "out"),
    }
    shapes = {name: shape for name, (shape, _) in shapes_and_specs.items()}
    names = {name: axis_names.get(name, (None,) * len(shape)) for name, shape in shapes.items()}
    specs = {name: PartitionSpec(*spec) for name, (_, spec) in shapes_and_specs.items()}
    # A solver on the devices would compile for each length of a block.
    options = ShampooOptions(
        block_size=32, interval=2, ridge=1e-4, treatments=((".*", "shampoo"),), refresh="host", delay=0
    )
    random = np.random.default_rng(0)
    stream = [{k: random.normal(size=s).astype(np.float32) for k, s in shapes.items()} for _ in range(4)]

    def updates(mesh):
        """Return the updates of every step, from gradients sharded like the parameters; axes that do not divide are
        replicated."""
        tx = distributed_shampoo(0.01, options, mesh=mesh, axis_names=names, param_specs=specs)
        params, own, shardings = {k: jnp.zeros(s) for k, s in shapes.items()}, None, None
        if mesh is not None:
            whole = {"odd": PartitionSpec()}
            own = {k: NamedSharding(mesh, whole.get(k, spec)) for k, spec in specs.items()}
            params = jax.device_put(params, own)
            shardings = tx.state_shardings(params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        step = jax.jit(tx.update, out_shardings=(own, shardings) if mesh is not None else None)
        history = []
        with contextlib.closing(tx.host_roots(params)) as host:
            state = host.start(state)
            for grads in stream:
                update, state = step(jax.device_put(grads, own), host.install(state))
                host.take(state)
                history.append(jax.tree.map(np.asarray, update))
        assert int(state.skipped) == 0
        assert sum(int(bucket.roots.refreshes.sum()) for bucket in state.buckets.values()) > 0
        return history

    alone, shared = updates(None), updates(programs.mesh_of(fsdp=4, tensor=2))
    for step, (wanted, found) in enumerate(zip(alone, shared, strict=True)):
        for k in shapes:
            assert np.linalg.norm(found[k] - wanted[k]) <= 2e-4 * np.linalg.norm(wanted[k]), (step, k)
