"""Compile optimizer steps for TPU slices, without a TPU, and check their collectives."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest
from jax import lax
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shampax.framework.planning import collectives
from shampax.optimizers import ShampooOptions, distributed_shampoo
from shampax.optimizers.baselines import AdamWOptions
from shampax.optimizers.host.parcels import Parcels

pytest.importorskip("libtpu", reason="TPU programs need the compiler in libtpu, which is for Linux on x86-64")

pytestmark = pytest.mark.slow

OPTIONS = ShampooOptions(block_size=128, interval=20, early_intervals=(), solver="newton")
SHAPES = {"up": (1024, 4096), "down": (4096, 1024)}
# Compile in a third of the time; all blocks are whole on every mesh.
FEW = {"up": (1024, 1024), "down": (1024, 1024)}


@functools.cache
def slice_of(topology: str, **axes: int) -> Mesh:
    """Return a mesh over the chips of a slice; its axes follow the links between chips if the sizes allow it."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server
        environment.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        environment.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-16")
        environment.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another test process may use libtpu
        chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(mesh_utils.create_device_mesh(tuple(axes.values()), list(chips)), tuple(axes))


LAYOUTS = {
    "replicated": ("v5e:4x4", {"x": 4, "y": 4}, programs.replicated),
    "fsdp": ("v5e:2x4", {"fsdp": 8}, programs.fsdp),
    "fsdp x tensor": ("v5e:2x4", {"fsdp": 4, "tensor": 2}, programs.fsdp_tensor),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tpu_traffic_beyond_the_baseline(layout):
    """Fault: the TPU compiler joins, gathers or permutes blocks although that of CPUs does not."""
    topology, axes, specs = LAYOUTS[layout]
    mesh = slice_of(topology, **axes)
    text = programs.lower_shampoo(FEW, mesh, specs, OPTIONS).lowered.compile().as_text()
    found = collectives.find(text)
    whole = sum(4 * math.prod(shape) for shape in FEW.values())
    part = whole / mesh.size
    assert [c.kind for c in found].count("all-to-all") == 2
    assert programs.total(found, "all-to-all") <= 2.5 * part
    gathered = whole if layout == "replicated" else 0
    assert gathered <= programs.total(found, "all-gather") <= 1.01 * gathered
    assert programs.total(found, "all-reduce", "reduce-scatter", "collective-permute") <= 0.01 * part
    inside = programs.inside_loops(text)
    assert inside and not programs.communicates(inside)


def train_step(mesh: Mesh, tx: optax.GradientTransformation, spread: bool) -> list[collectives.Collective]:
    """Return the collectives of a data-parallel step of an MLP with four replicated 512 x 512 matrices.

    Args:
      mesh: all axes divide the batch.
      tx: the optimizer.
      spread: whether gradients are sharded over the axes of the mesh, one after the other, before they are used.
    """
    axes = mesh.axis_names
    params = programs.structs({f"w{i}": (512, 512) for i in range(4)}, mesh, programs.replicated)
    state = programs.laid_out_state(tx, params, mesh)
    batch = jax.ShapeDtypeStruct((64 * mesh.size, 512), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(axes)))

    def loss(params, x):
        for w in params.values():
            x = jnp.tanh(x @ w)
        return jnp.mean(jnp.square(x))

    def step(params, state, batch):
        grads = jax.grad(loss)(params, batch)
        for count in range(1, len(axes) + 1 if spread else 1):
            sharding = NamedSharding(mesh, PartitionSpec(axes[:count]))
            grads = {name: lax.with_sharding_constraint(g, sharding) for name, g in grads.items()}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    own = jax.tree.map(lambda x: x.sharding, (params, state))
    lowered = jax.jit(step, out_shardings=own, donate_argnums=(0, 1)).lower(params, state, batch)
    return collectives.find(lowered.compile().as_text())


def test_tpu_gradients_are_reduce_scattered_to_the_tiles():
    """Fault: whole gradients are all-reduced although each device needs only its part.

    AdamW reduces to all (twice the parameters per device, less the device's own part); reducing to the parts and
    gathering the updates is as much, which leaves the all-to-alls as the price. Gradients must be divided along their
    rows, over one physical axis after the other: the compiler makes a reduce-scatter of nothing else.
    """
    mesh = slice_of("v5e:4x4", x=4, y=4)
    whole = 4 * 4 * 512 * 512
    adamw = train_step(mesh, AdamWOptions().build(0.01), spread=False)
    assert programs.total(adamw, "all-reduce") == pytest.approx(whole, rel=0.01)
    specs = {f"w{i}": PartitionSpec(("x", "y")) for i in range(4)}
    ours = train_step(mesh, distributed_shampoo(0.01, OPTIONS, mesh=mesh, param_specs=specs), spread=True)
    assert programs.total(ours, "all-reduce") <= 0.01 * whole
    assert programs.total(ours, "reduce-scatter") <= 0.32 * whole  # a quarter over the one axis, 1/16 over the other
    assert programs.total(ours, "all-gather") == pytest.approx(whole, rel=0.01)
    assert sum(c.sent for c in ours) <= 1.1 * sum(c.sent for c in adamw)


def test_tpu_gradients_of_replicated_parameters_are_reduced_once():
    """Fault: gradients are reduced again after they are split. The gather of updates is half of AdamW's traffic."""
    mesh = slice_of("v5e:4x4", x=4, y=4)
    whole = 4 * 4 * 512 * 512
    ours = train_step(mesh, distributed_shampoo(0.01, OPTIONS, mesh=mesh), spread=False)
    assert programs.total(ours, "all-reduce", "reduce-scatter") <= 1.01 * whole
    assert programs.total(ours, "all-gather") == pytest.approx(whole, rel=0.01)
    assert programs.total(ours, "all-to-all") == pytest.approx(2 * whole / mesh.size, rel=0.01)


def test_tpu_steps_with_roots_on_the_host_have_no_solver_and_no_traffic_of_parcels():
    """Faults: a solver remains in the step; a transfer waits for other devices; installing copies roots; a parcel has
    more blocks than are due; a step loads all statistics at once."""
    topology, axes, specs = LAYOUTS["replicated"]
    mesh = slice_of(topology, **axes)
    options = dataclasses.replace(OPTIONS, refresh="host", delay=4)
    step = programs.lower_shampoo(SHAPES, mesh, specs, options)
    text = step.lowered.compile().as_text()
    assert not programs.inside_loops(text)
    assert "stablehlo.while" not in step.lowered.as_text()
    assert "stablehlo.while" in programs.lower_shampoo(SHAPES, mesh, specs, OPTIONS).lowered.as_text()

    tx = step.tx
    layout = tx.layout(step.params)
    owners = layout.owners
    parcels = Parcels(layout.plan.buckets, owners, options)
    by_block, everywhere = owners.sharding(owners.by_block), owners.sharding(PartitionSpec())

    def struct(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    roots = {name: bucket.roots for name, bucket in step.state.buckets.items()}
    tables = jax.tree.map(lambda x: struct(x, by_block), {b.name: b.due for b in parcels.buckets})
    number = struct(np.int32(0), everywhere)
    take = parcels.take.lower(roots, tables, number, number, number).compile()
    answer = parcels.empty_answer()
    parcel = struct(np.broadcast_to(answer, (mesh.size, *answer.shape)), by_block)
    written = {name: r._replace(statistics=(), scale_log2=None) for name, r in roots.items()}
    install = parcels.install.lower(written, parcel, number, number, number).compile()
    for program in (take, install):
        assert collectives.find(program.as_text()) == []
    all_roots, due = programs.device_bytes(written), answer.nbytes
    (bucket,) = parcels.buckets
    slots = bucket.slots.shape[1]
    assert due <= 1.05 * all_roots * math.ceil(slots / options.interval) / slots
    assert take.memory_analysis().output_size_in_bytes <= 1.1 * due + 4096
    assert install.memory_analysis().alias_size_in_bytes >= all_roots
    assert install.memory_analysis().temp_size_in_bytes <= 3 * due + 2**16
