"""Clicks on advertisements: logs in Criteo's form."""

from .criteo import ClickData

__all__ = ["ClickData"]
