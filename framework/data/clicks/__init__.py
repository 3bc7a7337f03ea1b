"""Clicks on advertisements: logs in Criteo's form, and synthetic ones."""

from .criteo import ClickData
from .synthetic import SyntheticClicks

__all__ = ["ClickData", "SyntheticClicks"]
