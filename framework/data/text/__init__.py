"""Text for a language model: tokenized and packed once, then read by row."""

from .text import TextData

__all__ = ["TextData"]
