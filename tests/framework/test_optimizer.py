"""Find the layout of Distributed Shampoo's state inside chains and wrappers of optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shampax.framework import optimizer
from shampax.optimizers import ShampooOptions, distributed_shampoo, scale_by_shampoo
from shampax.optimizers.checkpoint.inheritance import Fresh, Kept, Made
from shampax.optimizers.plan import patterns

OPTIONS = ShampooOptions(block_size=16, refresh="host", delay=1)
PARAMS = {
    "b": np.zeros(48, np.float32),
    "e": {"embed": np.zeros((32, 16), np.float32)},
    "w": np.zeros((64, 48), np.float32),
}


def mesh():
    return Mesh(jax.devices()[:4], ("fsdp",))


def specified():
    sharding = NamedSharding(mesh(), PartitionSpec("fsdp"))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), PARAMS)


def wrapped():
    inner = distributed_shampoo(0.1, OPTIONS, mesh=mesh())
    parts = optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(0.1)
    labels = {"b": "adam", "e": {"embed": "adam"}, "w": "shampoo"}
    return {
        "alone": ("", inner),
        "after clipping": ("1", optax.chain(optax.clip_by_global_norm(1.0), inner)),
        "between parts of optax": ("0", optax.chain(scale_by_shampoo(OPTIONS, mesh=mesh()), *parts)),
        "MultiSteps": ("inner_opt_state", optax.MultiSteps(inner, 2).gradient_transformation()),
        "masked": ("inner_state", optax.masked(inner, {"b": False, "e": True, "w": True})),
        "multi_transform": (
            "inner_states/shampoo/inner_state",
            optax.multi_transform({"shampoo": inner, "adam": optax.adam(0.1)}, labels),
        ),
        "inject_hyperparams": (
            "inner_state",
            optax.inject_hyperparams(lambda learning_rate: distributed_shampoo(learning_rate, OPTIONS, mesh=mesh()))(
                learning_rate=0.1
            ),
        ),
        "apply_if_finite": ("inner_state", optax.apply_if_finite(inner, 3)),
    }


@pytest.mark.parametrize("name", wrapped())
def test_a_wrapper_keeps_what_the_trainer_needs(name):
    """Fault: around Distributed Shampoo all arrays are replicated, and manifest, diagnostics and service are gone."""
    path, tx = wrapped()[name]
    params, state = specified(), jax.eval_shape(tx.init, PARAMS)
    found = dict(
        zip(patterns.paths(state), jax.tree.leaves(optimizer.state_shardings(tx, params, mesh())), strict=True)
    )
    blocks = {name: sharding for name, sharding in found.items() if "buckets/" in name}
    assert blocks and all(sharding.spec == PartitionSpec(("fsdp",)) for sharding in blocks.values())
    mirrors = [name for name in found if name.endswith(("/b", "diagonal/b/momentum", "mu/b"))]
    assert all(found[name].spec == PartitionSpec("fsdp") for name in mirrors)
    manifest = optimizer.manifest(tx, params)
    assert list(manifest) == [path] and manifest[path]["buckets"]
    assert "shampoo" in optimizer.treatments(tx, params)["w"]
    names = jax.eval_shape(optimizer.diagnostics, state)
    assert {"refreshes", "skipped"} <= set(names)
    saved = patterns.paths(optimizer.saved_spec(state, params))
    assert any("in_flight" in name for name in saved) and len(saved) > len(found)
    service = optimizer.service(tx, params)
    assert "host/solves" in service.metrics()
    service.close()


def test_a_service_works_on_the_part_inside_a_chain():
    """Fault: statistics are taken from, or roots installed in, another place than the part's."""
    options = ShampooOptions(interval=1, delay=0, refresh="host", block_size=16)
    params = {"w": jnp.zeros((16, 16))}
    alone, chain = distributed_shampoo(0.1, options), optax.chain(optax.identity(), distributed_shampoo(0.1, options))
    results = []
    for tx in (alone, chain):
        service = optimizer.service(tx, params)
        state, step = service.start(tx.init(params)), jax.jit(tx.update)
        for seed in range(3):
            grads = {"w": jax.random.normal(jax.random.key(seed), (16, 16))}
            updates, state = step(grads, service.install(state), params)
            service.take(state)
        state = service.with_in_flight(state)
        results.append((updates, jax.tree.leaves(state)))
        assert service.metrics()["host/solves"] >= 2
        service.close()
    for mine, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_chain_around_the_optimizer_may_change():
    """Fault: all statistics and roots are lost when clipping is added."""
    (_, alone), (_, chain) = wrapped()["alone"], wrapped()["after clipping"]
    params = specified()
    state = jax.eval_shape(alone.init, PARAMS)
    shapes = {name: leaf.shape for name, leaf in zip(patterns.paths(state), jax.tree.leaves(state), strict=True)}
    taken = optimizer.Inheritance(chain, params, optimizer.manifest(alone, params), shapes, lambda path: path)
    for name, shape in shapes.items():
        source = taken.source(f"1/{name}", shape)
        assert source == Kept(name) or (isinstance(source, Made) and source.names == (name,))
    assert not any(why for fates in taken.report().values() for why in fates.values())
    nothing = optimizer.Inheritance(chain, params, {}, {}, lambda path: path)
    assert nothing.source("1/count", ()) == Fresh("not saved") and "1 of the optimizer" in nothing.notes()[0]
