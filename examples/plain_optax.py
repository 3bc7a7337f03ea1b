"""Distributed Shampoo in a training loop of your own: it is an optax transformation and needs no trainer.

    python examples/plain_optax.py

Takes about 5 seconds. docs/optimizer.md has the options, and how to spread the work over a mesh.
"""

import jax
import jax.numpy as jnp
import optax

from shampax.optimizers import ShampooOptions, distributed_shampoo

inputs = jax.random.normal(jax.random.key(0), (256, 32))
targets = jnp.sin(inputs @ jax.random.normal(jax.random.key(1), (32, 8)))
params = {"hidden": jnp.eye(32), "out": jnp.zeros((32, 8))}

tx = distributed_shampoo(0.02, ShampooOptions(block_size=32, interval=5))


def loss(params):
    """Return the mean squared error of a network with one hidden layer."""
    return jnp.mean((jnp.tanh(inputs @ params["hidden"]) @ params["out"] - targets) ** 2)


@jax.jit
def step(params, state):
    """Return parameters and optimizer state after one step."""
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


state = tx.init(params)
print(f"loss before: {loss(params):.3f}")
for _ in range(100):
    params, state = step(params, state)
print(f"loss after: {loss(params):.3f}")
