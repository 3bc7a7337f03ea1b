"""shampax: a training framework for large Flax models with Distributed Shampoo built in.

`shampax.distributed_shampoo` and `shampax.ShampooOptions` are all that plain optax code needs; `shampax.train` is what
the command line calls. They are imported when asked for: launchers set JAX's environment before JAX is there.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ShampooOptions": "optimizers",
    "distributed_shampoo": "optimizers",
    "train": "framework.train",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'shampax' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
