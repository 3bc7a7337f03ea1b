"""Preconditioners, by the first word of a treatment."""

from .base import Preconditioner
from .kl_shampoo import KLShampoo
from .muon import Muon
from .shampoo import Shampoo
from .soap import Soap

PRECONDITIONERS: dict[str, Preconditioner] = {
    "shampoo": Shampoo(),
    "one_sided": Shampoo(side="short"),
    "soap": Soap(),
    "kl_shampoo": KLShampoo(),
    "muon": Muon(),
}
