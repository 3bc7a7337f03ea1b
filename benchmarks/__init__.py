"""Measure optimizers and schedules side by side; print JSON. Importing this sets the environment that JAX needs."""

from ..launch.environment import before_jax

before_jax()
