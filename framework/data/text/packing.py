"""Documents packed into rows of one length, ahead of time, so that a batch is a pure function of its step.

Rows are full: a document that does not fit continues in the next row as a new segment, whose first token repeats the
last token of the previous row. Inputs are `row[:-1]` and targets `row[1:]`; a target counts if its segment equals its
input's. So every token of every document, and its end, is predicted exactly once.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ...dataset import Example
from ..reading.shards import rows_of

Row = tuple[np.ndarray, np.ndarray]


def pack(documents: Iterable[np.ndarray], row_length: int) -> Iterator[Row]:
    """Yield rows (tokens, segments), each int32 [row_length], from documents int32 [length >= 2].

    Segments number the documents in a row from 1; 0 is padding: at most one slot at the end of a row, and the rest of
    the last row.
    """
    tokens, segments, used = np.zeros(row_length, np.int32), np.zeros(row_length, np.int32), 0
    for document in documents:
        start = 0
        while start < len(document) - 1:
            if row_length - used < 2:
                yield tokens, segments
                tokens, segments, used = np.zeros(row_length, np.int32), np.zeros(row_length, np.int32), 0
            piece = document[start : start + row_length - used]
            tokens[used : used + len(piece)] = piece
            segments[used : used + len(piece)] = segments[used - 1] + 1 if used else 1
            used += len(piece)
            start += len(piece) - 1
    if used:
        yield tokens, segments


def real_targets(segments: np.ndarray) -> np.ndarray:
    """Return which slots of segments [..., row_length] are targets, bool of the same shape; the first slot never is."""
    real = np.zeros(segments.shape, bool)
    real[..., 1:] = (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)
    return real


def positions(segments: np.ndarray) -> np.ndarray:
    """Return the position of each slot of segments [..., row_length] inside its segment, from 0: int32."""
    slots = np.arange(segments.shape[-1], dtype=np.int32)
    starts = np.diff(segments, prepend=-1) != 0
    return slots - np.maximum.accumulate(np.where(starts, slots, 0), axis=-1)


def row_type(row_length: int, vocab_size: int) -> np.dtype:
    """Return the type of a row in a shard: tokens and segments, in the smallest types that hold them."""
    tokens, segments = np.min_scalar_type(vocab_size - 1), np.min_scalar_type(row_length)
    return np.dtype([("tokens", tokens, row_length), ("segments", segments, row_length)])


def to_bytes(row: Row, row_type: np.dtype) -> bytes:
    """Return the bytes of a row of `pack` in a shard."""
    packed = np.empty((), row_type)
    packed["tokens"], packed["segments"] = row
    return packed.tobytes()


COLUMNS = ("tokens", "segments", "positions", "characters")


def unpacked(contents: Sequence[bytes], row_type: np.dtype, characters: np.ndarray) -> list[Example]:
    """Return the examples of rows of a shard: int32 [row_length] arrays by `COLUMNS`.

    tokens: ids. segments: number of the document inside the row, from 1; 0 is padding. positions: position inside the
    segment, from 0. characters: number of characters that begin in a token, 0 if the token is not a target.

    Args:
      contents: results of `to_bytes`.
      row_type: type of a row.
      characters: number of characters that begin in each token, int32 [vocab_size].
    """
    rows = np.frombuffer(b"".join(contents), row_type)
    tokens, segments = rows["tokens"].astype(np.int32), rows["segments"].astype(np.int32)
    counts = np.where(real_targets(segments), characters[tokens], 0)
    return rows_of(dict(zip(COLUMNS, (tokens, segments, positions(segments), counts), strict=True)))
