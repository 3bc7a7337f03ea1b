"""Sentence pairs packed into rows of fixed lengths: stored as tokens, laid out when a row is read.

A pair takes one source slot for each source token and one for the end; and one target slot for each target token, one
for the end before it, from which the first token is predicted, and one for the end after it. Inputs are `target[:-1]`
and targets `target[1:]`; a target counts if its segment equals its input's and is not 0.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ...dataset import Example
from ..text.packing import positions

END = 0  # the token before and after each target and after each source; padding has it too, with segment 0
TokenPair = tuple[np.ndarray, np.ndarray]
COLUMNS = tuple(f"{side}{part}" for side in ("source", "target") for part in ("", "_segments", "_positions"))


class Packer:
    """Converts pairs to the rows of a shard, and rows to examples.

    A row on disk: number of pairs, int32; numbers of source and target tokens of each, int32; all source tokens and all
    target tokens, without ends, in the smallest type that holds them.

    Args:
      source_length: source slots of a row.
      target_length: target slots; a row of targets holds one more, the first input.
      most: largest number of pairs in a row; 0 is as many as fit.
      vocab_size: tokens of both languages.
    """

    def __init__(self, source_length: int, target_length: int, most: int, vocab_size: int):
        self._source_length, self._target_length, self._most = source_length, target_length, most
        self._type = np.min_scalar_type(vocab_size - 1)

    def holds(self, count: int, source: int, target: int) -> bool:
        """Return whether `count` pairs with `source` and `target` tokens in total, without ends, fit into a row."""
        fits = source + count <= self._source_length and target + 2 * count <= self._target_length + 1
        return fits and not 0 < self._most < count

    def pack(self, pairs: Iterable[TokenPair]) -> Iterator[bytes]:
        """Yield rows of pairs of tokens without ends, in order; a pair that does not fit begins the next row.

        Each pair must fit into an empty row.
        """
        row, source, target = [], 0, 0
        for pair in pairs:
            wider = [len(row) + 1, source + len(pair[0]), target + len(pair[1])]
            if row and not self.holds(*wider):
                yield self._to_bytes(row)
                row, wider = [], [1, len(pair[0]), len(pair[1])]
            row.append(pair)
            _, source, target = wider
        if row:
            yield self._to_bytes(row)

    def _to_bytes(self, row: list[TokenPair]) -> bytes:
        lengths = np.array([len(row), *(len(side) for pair in row for side in pair)], np.int32)
        tokens = np.concatenate([pair[side] for side in (0, 1) for pair in row]).astype(self._type)
        return lengths.tobytes() + tokens.tobytes()

    def __call__(self, contents: Sequence[bytes]) -> list[Example]:
        """Return the examples of rows: int32 arrays by `COLUMNS`.

        source: token ids [source_length]. target: [target_length + 1]. *_segments: number of the pair inside the row,
        from 1, the same on both sides; 0 is padding. *_positions: position inside the segment, from 0.
        """
        return [self._example(content) for content in contents]

    def _example(self, content: bytes) -> Example:
        count = int(np.frombuffer(content, np.int32, 1)[0])
        lengths = np.frombuffer(content, np.int32, 2 * count, offset=4).reshape(count, 2)
        packed = np.frombuffer(content, self._type, offset=4 + lengths.nbytes)
        row, start = {}, 0
        for side, (name, length, before) in enumerate(
            [("source", self._source_length, 0), ("target", self._target_length + 1, 1)]
        ):
            tokens, segments, used = np.full(length, END, np.int32), np.zeros(length, np.int32), 0
            for number, taken in enumerate(lengths[:, side].tolist(), start=1):
                wide = before + taken + 1
                tokens[used + before : used + wide - 1] = packed[start : start + taken]
                segments[used : used + wide] = number
                used, start = used + wide, start + taken
            row |= {name: tokens, f"{name}_segments": segments, f"{name}_positions": positions(segments)}
        return row
