"""Pairs of texts as rows of one length in npy files, written once and read at random."""

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from . import packing
from .masking import Row
from .next_sentence import Pair
from .wordpiece import Vocabulary

_ROWS_AT_ONCE = 1_024


def write_pairs(directory: Path, paired: Iterable[Pair], vocabulary: Vocabulary, length: int) -> tuple[int, str]:
    """Stream pairs to `directory`/tokens.npy [rows, length] and bounds.npy [rows, 3]: ends of both texts, is_next.

    Returns:
      How many, and a hash of their content.
    """
    directory.mkdir(parents=True)
    count = 0
    start, separator = np.array([vocabulary.start], np.int32), np.array([vocabulary.separator], np.int32)
    with (
        packing.NpyWriter(directory / "tokens.npy", length, np.min_scalar_type(vocabulary.size - 1)) as tokens,
        packing.NpyWriter(directory / "bounds.npy", 3, np.dtype(np.int32)) as bounds,
    ):
        for pair in paired:
            row = np.concatenate([start, pair.first, separator, pair.second, separator])
            tokens.append(np.pad(row, (0, length - len(row)), constant_values=vocabulary.pad)[None])
            bounds.append(np.array([[len(pair.first) + 2, len(row), pair.is_next]], np.int32))
            count += 1
    return count, hashlib.sha256((tokens.digest() + bounds.digest()).encode()).hexdigest()


class PairRows:
    """Random access to the unmasked rows of one split: `rows[i]` is a dict of int32 arrays.

    tokens [T]; segments [T], 1 for [CLS], the first text and its [SEP], 2 for the second text and its [SEP], 0 for
    padding; is_next, 1 where the second text follows the first; vocabulary, the fields of `Vocabulary`, which masking
    needs. Memory-mapped on first use, so that a pickled copy carries only the path.
    """

    def __init__(self, directory: Path, vocabulary: Vocabulary):
        self._directory, self._vocabulary = directory, vocabulary

    @functools.cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        # asarray sheds the memmap subclass, whose every slice costs microseconds; the memory stays mapped.
        tokens, bounds = (
            np.load(self._directory / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("tokens", "bounds")
        )
        return np.asarray(tokens), np.asarray(bounds)

    def __getstate__(self) -> dict[str, Any]:
        return {"_directory": self._directory, "_vocabulary": self._vocabulary}

    def __repr__(self) -> str:
        return f"PairRows({self._directory})"

    def __len__(self) -> int:
        return len(self._arrays[0])

    def __getitem__(self, index: int) -> Row:
        tokens, bounds = self._arrays
        first, end, is_next = bounds[index].tolist()
        segments = np.zeros(tokens.shape[1], np.int32)
        segments[:first], segments[first:end] = 1, 2
        return {
            "tokens": tokens[index].astype(np.int32),
            "segments": segments,
            "is_next": np.array(is_next, np.int32),
            "vocabulary": np.array(self._vocabulary, np.int32),
        }

    def token_counts(self) -> np.ndarray:
        """How often each token stands in the rows, int64 [V]."""
        tokens, _ = self._arrays
        counts = np.zeros(self._vocabulary.size, np.int64)
        for start in range(0, len(tokens), _ROWS_AT_ONCE):
            counts += np.bincount(tokens[start : start + _ROWS_AT_ONCE].ravel(), minlength=len(counts))
        return counts
