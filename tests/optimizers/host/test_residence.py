"""Statistics in host memory: the same run, with less on the devices."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizing import LAYOUTS, SHARDED_OPTIONS, SHARDED_SHAPES, gradients, optimizer, place, train, zeros

from shampax.framework.optimizer import service
from shampax.optimizers import ShampooOptions, distributed_shampoo, residence

# One bucket.
SHAPES = {name: shape for name, shape in SHARDED_SHAPES.items() if name != "square"}
ON_DEVICES = dataclasses.replace(SHARDED_OPTIONS, solver="eigh")
HOSTED = dataclasses.replace(ON_DEVICES, statistics_memory="host")
VARIANTS = {
    "staggered": {},
    "every three steps": {"statistics_every": 3, "beta2": 0.9},
    "early, late, bfloat16": {
        "early_intervals": ((4, 1),), "start_step": 3, "statistics_dtype": "bfloat16", "ridge": 1e-2,
    },
}  # fmt: skip


def kinds(state):
    return {s.sharding.memory_kind for b in state.buckets.values() for s in b.roots.statistics}


def same(x, y):
    """Up to what XLA fuses differently, and where numbers are kept in bfloat16, up to one of its units."""

    def compare(a, b):
        rtol = 2.0**-7 if a.dtype == jnp.bfloat16 else 2e-4
        np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=rtol, atol=1e-5)

    jax.tree.map(compare, x, y)


def specs_of(layout):
    """(mesh, specs of `SHAPES`)."""
    mesh, specs = LAYOUTS[layout]
    return mesh, specs and {name: specs[name] for name in SHAPES}


@pytest.fixture
def small_chunks(monkeypatch):
    """One or two blocks at a time."""
    monkeypatch.setattr(residence, "_CHUNK_BYTES", 2 * 16 * 16 * 4)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("every three steps", "one device"),
        ("early, late, bfloat16", "fsdp x tensor"),
        pytest.param("every three steps", "fsdp x tensor", marks=pytest.mark.slow),
        pytest.param("early, late, bfloat16", "one device", marks=pytest.mark.slow),
        pytest.param("staggered", "fsdp x tensor", marks=pytest.mark.slow),
    ],
)
def test_the_same_run_as_in_device_memory(name, layout, small_chunks):
    """Catches statistics that are left out, renewed twice or at another step, and any that stay on a device."""
    mesh, specs = specs_of(layout)
    stream = gradients(9, SHAPES)
    plain, hosted = (dataclasses.replace(options, **VARIANTS[name]) for options in (ON_DEVICES, HOSTED))
    there = train(hosted, stream, mesh=mesh, specs=specs)
    here = train(plain, stream, mesh=mesh, specs=specs)
    same(there.updates, here.updates)
    assert all(kinds(state) == {"pinned_host"} for state in there.states)
    same(*(jax.tree.map(np.asarray, run.states[-1].buckets) for run in (there, here)))


@pytest.mark.parametrize("bad", [np.nan, 1e30])
def test_a_refused_step_leaves_statistics_in_host_memory_alone(bad, small_chunks):
    """Catches statistics that are written before it is known whether the step is accepted."""
    mesh, specs = specs_of("fsdp x tensor")
    stream, options = gradients(4, SHAPES), dataclasses.replace(HOSTED, **VARIANTS["early, late, bfloat16"])
    clean = train(options, stream[:3], mesh=mesh, specs=specs)
    poisoned = stream[3] | {"down": stream[3]["down"] * np.float32(bad)}
    hit = train(options, [poisoned], state=clean.states[-1], mesh=mesh, specs=specs)
    assert int(hit.states[0].skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, hit.states[0]._replace(skipped=0), clean.states[-1]._replace(skipped=0))


def test_with_roots_on_the_host(small_chunks):
    """Catches a service that cannot read what is not on the devices, and statistics that move when they are read."""
    mesh, specs = specs_of("replicated")
    stream, ends = gradients(9, SHAPES), []
    for memory in ("host", "device"):
        options = dataclasses.replace(SHARDED_OPTIONS, refresh="host", delay=1, statistics_memory=memory)
        tx = optimizer(options, mesh, specs=specs)
        params = place(zeros(SHAPES), mesh, specs)
        shardings = tx.state_shardings(params)
        step = jax.jit(tx.update, out_shardings=({k: x.sharding for k, x in params.items()}, shardings))
        with contextlib.closing(service(tx, params)) as host:
            state = host.start(jax.jit(tx.init, out_shardings=shardings)(params))
            for grads in stream:
                update, state = step(place(grads, mesh, specs), host.install(state), params)
                host.take(state)
            assert kinds(state) == {"pinned_host" if memory == "host" else "device"}
        ends.append(jax.tree.map(np.asarray, update))
    same(*ends)


def test_without_a_mesh_or_shardings():
    """Catches an optimizer that needs the trainer to place its state."""
    tx = distributed_shampoo(1.0, ShampooOptions(statistics_memory="host", block_size=8, solver="eigh"))
    params = {"w": jnp.ones((16, 8))}
    state = tx.init(params)
    step = jax.jit(tx.update, donate_argnums=1)
    for grads in gradients(3, {"w": (16, 8)}):
        _, state = step(grads, state, params)
    assert kinds(state) == {"pinned_host"}
    with pytest.raises(ValueError, match="would stream all statistics"):
        ShampooOptions(statistics_memory="host", refresh="periodic")
