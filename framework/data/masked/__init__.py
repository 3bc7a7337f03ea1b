"""Masked text for BERT: pairs of texts whose tokens are masked when a row is read."""

from .masked import MaskedTextData

__all__ = ["MaskedTextData"]
