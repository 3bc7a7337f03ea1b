import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampax.models import modules


class Layer(nn.Module):
    """A layer with a parameter, a running sum and dropout."""

    rate: float

    @nn.compact
    def __call__(self, x, shift):
        weight = self.param("weight", nn.initializers.normal(1.0), x.shape)
        kept = self.variable("sums", "of_inputs", jnp.zeros, x.shape)
        kept.value += x
        x = jnp.tanh(nn.Dropout(self.rate, deterministic=False)(weight * x)) + shift
        return x, x.sum()


class Stack(nn.Module):
    """Three layers and their sums."""

    remat: str
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, shift):
        stack = modules.scan_layers(lambda layer, x, shift: layer(x, shift), 3, state=("sums",))
        return stack(modules.recomputed(Layer, self.remat)(self.rate, name="layers"), x, shift)


@pytest.mark.parametrize("remat", list(modules.REMAT_POLICIES))
def test_scanned_layers_equal_a_loop(remat):
    """Fault: scan or rematerialisation shares, reorders or skips layers, or loses their state or results."""
    x, shift = jnp.arange(1.0, 5.0), 0.5
    variables = jax.jit(Stack(remat).init)(jax.random.key(0), x, shift)
    assert len(set(np.ravel(variables["params"]["layers"]["weight"]))) == 12

    def scanned(params):
        given = {**variables, "params": params}
        (last, sums), state = Stack(remat).apply(given, x, shift, mutable=["sums"])
        return last.sum(), (sums, state["sums"]["layers"]["of_inputs"])

    def loop(params):
        y, sums, states = x, [], []
        for layer in range(3):
            given = jax.tree.map(lambda leaf, i=layer: leaf[i], {**variables, "params": params})
            own = {name: tree["layers"] for name, tree in given.items()}
            (y, total), state = Layer(0.0).apply(own, y, shift, mutable=["sums"])
            sums, states = [*sums, total], [*states, state["sums"]["of_inputs"]]
        return y.sum(), (jnp.stack(sums), jnp.stack(states))

    sides = (jax.jit(jax.value_and_grad(side, has_aux=True))(variables["params"]) for side in (scanned, loop))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *sides)


def test_stacked_layers_drop_different_units():
    """Fault: all layers use the same random key."""
    variables = Stack("none").init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, jnp.ones(64), 0.0)
    variables = jax.tree.map(jnp.ones_like, variables)
    rngs = {"dropout": jax.random.key(1)}
    (_, sums), _ = Stack("none", 0.5).apply(variables, jnp.ones(64), 0.0, mutable=["sums"], rngs=rngs)
    assert 16 < round(float(sums[0] / np.tanh(2))) < 48
    assert float(sums[1]) < 0.8 * float(sums[0])  # units that a layer has dropped stay 0; the next drops others
