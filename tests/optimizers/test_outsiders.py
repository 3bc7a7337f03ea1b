"""Use every optimizer of the package as other people's programs do. Most tests only trace."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shampax.optimizers import ShampooOptions, baselines, distributed_shampoo, scale_by_shampoo, shampoo

KINDS = ("shampoo", "one_sided", "soap", "kl_shampoo", "muon", "diagonal", "rows")
OPTIMIZERS = {kind: ShampooOptions(block_size=16, treatments=((".*", kind),)) for kind in KINDS} | {
    "adamw": baselines.AdamWOptions(weight_decay=0.1),
    "lamb": baselines.LambOptions(),
    "momentum": baselines.MomentumOptions(),
    "optax's muon": baselines.MuonOptions(),
    "adagrad": baselines.AdaGradOptions(),
}
PLAIN = ShampooOptions(exponent=0.0)  # compiles quickly without roots


def parameters(dtype=np.float32):
    return {"w": np.ones((24, 16), dtype), "b": np.ones(16, dtype), "s": np.ones((), dtype)}


def traced(tx, params, grads=None):
    """Return the shapes of (updates, state) of the second step."""
    state = jax.eval_shape(tx.init, params)
    grads = params if grads is None else grads
    _, state = jax.eval_shape(tx.update, grads, state, params)
    return jax.eval_shape(tx.update, grads, state, params)


def build(name, **layout):
    return OPTIMIZERS[name].build(lambda count: 0.1, **layout)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_of_every_form(name):
    """Faults: tuples, NumPy arrays, Python floats or missing axis names end in a traceback; x64 changes dtypes."""
    forms = {
        "tuples": ({"k": (np.ones((24, 16), np.float32), 1.0)}, {"k": (("a", "b"), ())}),
        "NumPy": (parameters(), None),
        "no names for one": (parameters(), {"w": ("a", None), "b": None, "s": None}),
    }
    for params, names in forms.values():
        updates, _ = traced(build(name, axis_names=names), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
    with jax.enable_x64(True):
        updates, _ = traced(build(name), parameters(np.float64))
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {np.dtype(np.float64)}


@pytest.mark.parametrize("name", [name for name, options in OPTIMIZERS.items() if isinstance(options, ShampooOptions)])
def test_strict_promotion_of_the_users_program(name):
    """Fault: an implicit conversion inside the optimizer is an error of the user's program."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        traced(build(name), parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_copies(name):
    """Fault: a copied optimizer is another one; a state cannot be pickled."""
    tx = copy.deepcopy(build(name))
    _, state = traced(tx, parameters())
    structure = jax.tree.structure(jax.eval_shape(build(name).init, parameters()))
    assert jax.tree.structure(state) == structure
    if name != "optax's muon":  # its state holds a function
        assert jax.tree.structure(pickle.loads(pickle.dumps(state))) == structure


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_state_of_numpy_arrays(name):
    """Fault: a state that a loop of the user's own has read from a file is refused, or needs its own conversion."""
    tx, params = build(name), parameters()
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(tx.init, params))
    wanted = jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(tx.update, params, state, params)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), wanted
    )


def test_a_restored_state_of_numpy_arrays_without_jit():
    """Fault: methods that only JAX's arrays have are used."""
    tx, params = distributed_shampoo(0.1, PLAIN), parameters()
    state = tx.update(params, tx.init(params), params)[1]
    wanted = tx.update(params, state, params)
    jax.tree.map(np.testing.assert_array_equal, tx.update(params, jax.tree.map(np.asarray, state), params), wanted)


def test_an_optimizer_is_pickled_as_those_of_optax_are():
    """Fault: a transformation can be pickled, but a copy in another process has another layout of its state."""
    for tx in (distributed_shampoo(0.1), optax.adam(0.1)):
        with pytest.raises((AttributeError, pickle.PicklingError), match="local"):
            pickle.dumps(tx)


def test_nnx_optimizer():
    """Fault: parameters are found by paths, which differ between `init` (Variables) and `update` (arrays)."""
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    before = np.asarray(model.kernel[...])
    optimizer = nnx.Optimizer(model, distributed_shampoo(0.1, PLAIN), wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 8))) ** 2))(model)
    optimizer.update(model, grads)
    assert np.any(np.asarray(model.kernel[...]) != before)


def test_a_step_without_jit_is_compiled_once():
    """Fault: each call traces and compiles again."""
    tx, params = distributed_shampoo(0.1, PLAIN), parameters()
    _, state = tx.update(params, tx.init(params), params)
    count = shampoo._precondition._cache_size()
    tx.update(params, tx.update(params, state, params)[1], params)
    assert shampoo._precondition._cache_size() == count


@pytest.mark.parametrize("names", [("a/b", "a"), ("a.b", "a"), ("a~1b", "a/b")])
def test_parameters_with_separators_in_their_names(names):
    """Fault: two parameters share one second moment."""
    first, second = names
    params = {first: jnp.ones(3), second: {"b": jnp.ones(4)}}
    state = jax.eval_shape(distributed_shampoo(0.1).init, params)
    assert sorted(moments.momentum.shape for moments in state.diagonal.values()) == [(3,), (4,)]


def refused(leaf):
    return lambda: distributed_shampoo(0.1).init(parameters() | {"odd": leaf})


def without_a_gradient():
    tx, params = distributed_shampoo(0.1), parameters()
    tx.update(params | {"b": None}, tx.init(params), params)


def with_an_injected_option():
    inject = optax.inject_hyperparams(lambda weight_decay: scale_by_shampoo(ShampooOptions(weight_decay=weight_decay)))
    traced(inject(weight_decay=0.1), parameters())


def on_another_mesh():
    params = jax.device_put(parameters(), NamedSharding(Mesh(jax.devices()[4:6], ("x",)), PartitionSpec()))
    distributed_shampoo(0.1, mesh=Mesh(jax.devices()[:4], ("data",))).init(params)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (refused(jnp.ones(3, jnp.complex64)), "parameter 'odd': has dtype complex64, must be a real float"),
        (refused(jnp.ones(3, jnp.int32)), "parameter 'odd': has dtype int32"),
        (refused(np.zeros(3, jax.dtypes.float0)), "parameter 'odd': has dtype"),
        (refused(jax.random.key(0)), "parameter 'odd': has dtype key"),
        (without_a_gradient, "parameter 'b': has nothing in update, shape \\(16,\\) in init"),
        (with_an_injected_option, "weight_decay is traced: options are constants"),
        (on_another_mesh, "parameter 'b': is on 2 devices, not all among the 4 of the mesh"),
        (lambda: distributed_shampoo(0.1, mesh=jax.make_mesh((4,), ("data",))), "mesh has axes of types .*Explicit"),
        (
            lambda: optax.tree_map_params(distributed_shampoo(0.1, PLAIN), jnp.copy, None),
            "optax.tree_map_params: this state has blocks of parameters",
        ),
    ],
    ids=["complex", "int", "float0", "key", "None", "injected", "other mesh", "explicit mesh", "tree_map_params"],
)
def test_what_cannot_work_is_refused_in_one_line(act, words):
    """Fault: a traceback from inside JAX, or a parameter that silently never moves."""
    with pytest.raises(ValueError, match=words):
        act()


def test_coupled_decay_is_computed_in_float32():
    """Fault: 1 + 1e-3 is rounded to 1 in the dtype of the gradient."""
    options = ShampooOptions(
        diagonal="sgd", beta1=0.0, weight_decay=1e-3, decay="coupled", decay_rules=((".*", True),), exponent=0.0
    )
    tx, params = distributed_shampoo(1.0, options), {"b": jnp.ones(3)}
    updates, _ = tx.update({"b": jnp.ones(3, jnp.bfloat16)}, tx.init(params), params)
    np.testing.assert_allclose(updates["b"], -1.001, rtol=1e-6)


@pytest.mark.parametrize("momentum", ["ema", "heavy_ball"])
def test_nesterov_of_a_constant_gradient(momentum):
    """Fault: the first updates of an average are up to 1.9 times too long."""
    tx = distributed_shampoo(1.0, ShampooOptions(diagonal="sgd", nesterov=True, momentum=momentum))
    grads = {"b": jnp.ones(3)}
    state, wanted = tx.init(grads), 0.0
    for _ in range(3):
        updates, state = tx.update(grads, state, grads)
        wanted = 0.9 * wanted + 1
        constant = 1.0 if momentum == "ema" else 1 + 0.9 * wanted
        np.testing.assert_allclose(updates["b"], -constant, rtol=1e-5)
