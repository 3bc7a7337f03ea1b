"""Distributed Shampoo, usable with plain optax and without the trainer."""

from .options import Treatment
from .shampoo import DistributedShampoo, ShampooOptions, distributed_shampoo, scale_by_shampoo
from .state import ShampooState

__all__ = [
    "DistributedShampoo",
    "ShampooOptions",
    "ShampooState",
    "Treatment",
    "distributed_shampoo",
    "scale_by_shampoo",
]
