"""Side-by-side measurements, each printing JSON. Sets the environment of JAX first of all."""

from ..launch.environment import before_jax

before_jax()
