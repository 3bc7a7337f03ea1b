"""The command line: one module per verb.

Its import sets the environment of JAX before any verb imports JAX.
"""

from .environment import before_jax

before_jax()
