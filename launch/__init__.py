"""The command line: one module per verb.

Sets the environment of JAX first of all, for whatever a verb imports.
"""

from .environment import before_jax

before_jax()
