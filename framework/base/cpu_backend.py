"""Set the flag that XLA's CPU backend needs to compute correctly, in every jaxlib release that this package allows.

Some fusions of a broadcast and a small product return zeros in large arrays (jax#39103). This module does not import
JAX: XLA reads its flags at the first compilation or look at the devices.
"""

import importlib.metadata
import os

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
# jaxlib releases that know the flag. XLA aborts the process if it does not know a flag.
_FIRST, _BEYOND = (0, 10), (0, 13)


def avoid_wrong_fusions() -> None:
    """Disable these fusions in `XLA_FLAGS`, unless the user has set the flag. Other flags stay."""
    release = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
    flags = os.environ.get("XLA_FLAGS", "")
    if _FIRST <= release < _BEYOND and _FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=".strip()
