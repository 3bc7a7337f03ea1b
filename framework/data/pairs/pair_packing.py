"""Sentence pairs into rows of fixed lengths: kept as tokens alone, laid out when a row is read.

A pair takes as many source slots as its source has tokens, and one for the end; and as many target slots as its target
has, one for the end before it, which the first token is predicted from, and one for the end after it. Inputs are
`target[:-1]` and targets `target[1:]`, and a target counts where its segment is its input's and not 0.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from ..text.packing import positions

END = 0  # the token before and after each target and after each source; also that of padding, whose segment is 0
TokenPair = tuple[np.ndarray, np.ndarray]
COLUMNS = tuple(f"{side}{part}" for side in ("source", "target") for part in ("", "_segments", "_positions"))


class Room:
    """What a row holds.

    Args:
      source_length: source slots.
      target_length: target slots; a row of targets holds one more, the first input.
      pairs: at most so many pairs; 0 is as many as fit.
    """

    def __init__(self, source_length: int, target_length: int, pairs: int):
        self.source_length, self.target_length, self.pairs = source_length, target_length, pairs

    def holds(self, count: int, source: int, target: int) -> bool:
        """Whether `count` pairs fit that have `source` and `target` tokens together, ends not counted."""
        fits = source + count <= self.source_length and target + 2 * count <= self.target_length + 1
        return fits and not 0 < self.pairs < count


class Packer:
    """Rows of pairs as they lie in a shard, and the examples that they stand for.

    A row on disk: how many pairs, int32; the source and target tokens of each, int32; all source tokens and all target
    tokens, without ends, in the smallest type that holds them.

    Args:
      room: what a row holds.
      vocab_size: tokens of both languages.
    """

    def __init__(self, room: Room, vocab_size: int):
        self._room, self._type = room, np.min_scalar_type(vocab_size - 1)

    def pack(self, pairs: Iterable[TokenPair]) -> Iterator[bytes]:
        """Pairs of tokens, without ends, in their order; one that does not fit any more begins the next row.

        Each must fit by itself.
        """
        row, source, target = [], 0, 0
        for pair in pairs:
            wider = [len(row) + 1, source + len(pair[0]), target + len(pair[1])]
            if row and not self._room.holds(*wider):
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

    def __call__(self, content: bytes) -> dict[str, np.ndarray]:
        """The example of a row: int32 arrays by `COLUMNS`.

        source: token ids [source_length]. target: [target_length + 1]. *_segments: number of the pair inside the row,
        from 1, the same on both sides; 0 is padding. *_positions: place inside the segment, from 0.
        """
        count = int(np.frombuffer(content, np.int32, 1)[0])
        lengths = np.frombuffer(content, np.int32, 2 * count, offset=4).reshape(count, 2)
        packed = np.frombuffer(content, self._type, offset=4 + lengths.nbytes)
        row, start = {}, 0
        for side, (name, length, before) in enumerate(
            [("source", self._room.source_length, 0), ("target", self._room.target_length + 1, 1)]
        ):
            tokens, segments, used = np.full(length, END, np.int32), np.zeros(length, np.int32), 0
            for number, taken in enumerate(lengths[:, side].tolist(), start=1):
                wide = before + taken + 1
                tokens[used + before : used + wide - 1] = packed[start : start + taken]
                segments[used : used + wide] = number
                used, start = used + wide, start + taken
            row |= {name: tokens, f"{name}_segments": segments, f"{name}_positions": positions(segments)}
        return row
