"""Sentence pairs for translation."""

from .pairs import PairData

__all__ = ["PairData"]
