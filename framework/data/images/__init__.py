"""Labelled images."""

from .images import ImageData

__all__ = ["ImageData"]
