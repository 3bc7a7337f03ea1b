"""Choose XLA's CPU code generator for tests that compare two different programs bit for bit."""

import importlib.metadata

# The generators that conftest.py selects on jaxlib 0.10 contract a * b + c differently from one program to another.
SAME_BITS: dict[str, bool | int | str] = (
    {"xla_cpu_use_fusion_emitters": True} if importlib.metadata.version("jaxlib").startswith("0.10.") else {}
)
