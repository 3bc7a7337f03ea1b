"""A flag without which XLA's CPU backend computes wrong numbers, in every release of jaxlib that this package allows.

Some fusions of a broadcast and a small product give zeros in large arrays (jax#39103). Imports no JAX: XLA reads its
flags when it first compiles or looks at its devices.
"""

import importlib.metadata
import os

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
# Releases of jaxlib that know the flag. XLA ends a process that is given a flag it does not know.
_FIRST, _BEYOND = (0, 10), (0, 13)


def avoid_wrong_fusions() -> None:
    """Turn these fusions off in `XLA_FLAGS`, unless the user has set the same flag. Other flags stay."""
    release = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
    flags = os.environ.get("XLA_FLAGS", "")
    if _FIRST <= release < _BEYOND and _FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=".strip()
