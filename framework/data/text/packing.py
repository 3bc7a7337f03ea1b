"""Documents packed into rows of one length, ahead of time, so that a batch is a pure function of its step.

Rows are full: a document that does not fit continues in the next row as a new segment, whose first token repeats the
last token of the previous row. Inputs are `row[:-1]` and targets `row[1:]`; a target counts if its segment equals its
input's. So every token of every document, and its end, is predicted exactly once.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ...dataset import Example
from ..reading.shards import rows_of

Row = tuple[np.ndarray, np.ndarray, int]


def pack(documents: Iterable[tuple[np.ndarray, np.ndarray]], row_length: int) -> Iterator[Row]:
    """Yield rows (tokens, segments, bytes) from documents (tokens, bytes).

    Args:
      documents: tokens int32 [length >= 2], and the number of bytes of text that each stands for, [length].
      row_length: of tokens and segments, int32 [row_length].

    Segments number the documents in a row from 1; 0 is padding: at most one slot at the end of a row, and the rest of
    the last row. The bytes are those of the row's targets.
    """
    tokens, segments, used, count = np.zeros(row_length, np.int32), np.zeros(row_length, np.int32), 0, 0
    for document, sizes in documents:
        start = 0
        while start < len(document) - 1:
            if row_length - used < 2:
                yield tokens, segments, count
                tokens, segments, used, count = np.zeros_like(tokens), np.zeros_like(segments), 0, 0
            piece = document[start : start + row_length - used]
            tokens[used : used + len(piece)] = piece
            segments[used : used + len(piece)] = segments[used - 1] + 1 if used else 1
            count += int(sizes[start + 1 : start + len(piece)].sum())
            used += len(piece)
            start += len(piece) - 1
    if used:
        yield tokens, segments, count


def positions(segments: np.ndarray) -> np.ndarray:
    """Return the position of each slot of segments [..., row_length] inside its segment, from 0: int32."""
    slots = np.arange(segments.shape[-1], dtype=np.int32)
    starts = np.diff(segments, prepend=-1) != 0
    return slots - np.maximum.accumulate(np.where(starts, slots, 0), axis=-1)


def row_type(row_length: int, vocab_size: int) -> np.dtype:
    """Return the type of a row in a shard: tokens and segments in the smallest types that hold them, and bytes."""
    tokens, segments = np.min_scalar_type(vocab_size - 1), np.min_scalar_type(row_length)
    return np.dtype([("tokens", tokens, row_length), ("segments", segments, row_length), ("bytes", "<u4")])


def to_bytes(row: Row, row_type: np.dtype) -> bytes:
    """Return the bytes of a row of `pack` in a shard."""
    packed = np.empty((), row_type)
    packed["tokens"], packed["segments"], packed["bytes"] = row
    return packed.tobytes()


def shapes(row_length: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays of a row, all int32."""
    return dict.fromkeys(("tokens", "segments", "positions"), (row_length,)) | {"bytes": ()}


def unpacked(contents: Sequence[bytes], row_type: np.dtype) -> list[Example]:
    """Return the examples of rows of a shard: int32 arrays by `shapes`.

    tokens: ids. segments: number of the document inside the row, from 1; 0 is padding. positions: position inside the
    segment, from 0. bytes: number of bytes of the original text that the targets stand for.
    """
    rows = np.frombuffer(b"".join(contents), row_type)
    tokens, segments, count = (rows[name].astype(np.int32) for name in ("tokens", "segments", "bytes"))
    return rows_of({"tokens": tokens, "segments": segments, "positions": positions(segments), "bytes": count})
