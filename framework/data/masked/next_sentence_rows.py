"""Pairs of texts as rows of one length: how they lie in a shard, and what is read of them."""

import numpy as np

from ..text.wordpiece import Vocabulary
from .masking import Row
from .next_sentence import Pair


class PairRow:
    """A row on disk: its tokens in the smallest type that holds them, and three bounds: where the first text and the
    row end, and whether the second text follows.

    Args:
      vocabulary: that the tokens are of.
      length: tokens of a row.
    """

    def __init__(self, vocabulary: Vocabulary, length: int):
        self._vocabulary = vocabulary
        tokens = np.min_scalar_type(vocabulary.size - 1)
        self._type = np.dtype([("tokens", tokens, length), ("bounds", np.int32, 3)])

    def to_bytes(self, pair: Pair) -> bytes:
        """[CLS] first text [SEP] second text [SEP] and padding."""
        start, separator = ([each] for each in (self._vocabulary.start, self._vocabulary.separator))
        tokens = np.concatenate([start, pair.first, separator, pair.second, separator])
        row = np.full((), self._vocabulary.pad, self._type)
        row["tokens"][: len(tokens)] = tokens
        row["bounds"] = len(pair.first) + 2, len(tokens), pair.is_next
        return row.tobytes()

    def tokens(self, content: bytes) -> np.ndarray:
        """The tokens of a row [T], padding included."""
        return np.frombuffer(content, self._type)[0]["tokens"]

    def __call__(self, content: bytes) -> Row:
        """The unmasked row, int32 arrays.

        tokens [T]; segments [T], 1 for [CLS], the first text and its [SEP], 2 for the second text and its [SEP], 0 for
        padding; is_next, 1 where the second text follows the first; vocabulary, the fields of `Vocabulary`, which
        masking needs.
        """
        row = np.frombuffer(content, self._type)[0]
        first, end, is_next = row["bounds"].tolist()
        segments = np.zeros(len(row["tokens"]), np.int32)
        segments[:first], segments[first:end] = 1, 2
        return {
            "tokens": row["tokens"].astype(np.int32),
            "segments": segments,
            "is_next": np.array(is_next, np.int32),
            "vocabulary": np.array(self._vocabulary, np.int32),
        }
