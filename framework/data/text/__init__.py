"""Text for language models: documents, tokenizers, and rows of packed tokens."""

from .text import TextData

__all__ = ["TextData"]
