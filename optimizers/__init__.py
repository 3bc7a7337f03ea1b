"""Distributed Shampoo and its parts, usable with plain optax by people who never see the trainer."""

from .options import Treatment
from .shampoo import DistributedShampoo, ShampooOptions, distributed_shampoo
from .state import ShampooState

__all__ = ["DistributedShampoo", "ShampooOptions", "ShampooState", "Treatment", "distributed_shampoo"]
