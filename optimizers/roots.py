"""The public name of `inverse_pth_root`."""

from .linalg.roots import RootResult, inverse_pth_root

__all__ = ["RootResult", "inverse_pth_root"]
