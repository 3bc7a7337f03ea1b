"""Sentence pairs into rows of fixed lengths: kept end to end on disk, laid out in a row when it is read.

A pair takes as many source slots as its source has tokens, and one for the end; and as many target slots as its target
has, one for the end before it, which the first token is predicted from, and one for the end after it. Inputs are
`target[:-1]` and targets `target[1:]`, and a target counts where its segment is its input's and not 0.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .packing import NpyWriter, positions

END = 0  # the token before and after each target and after each source; also that of padding, whose segment is 0
TokenPair = tuple[np.ndarray, np.ndarray]
_PAIRS_PER_WRITE = 4096
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


def write_pairs(directory: Path, pairs: Iterable[TokenPair], room: Room, vocab_size: int) -> tuple[int, str]:
    """Stream pairs of tokens, without ends, to .npy files in `directory`, and say which of them make a row.

    Pairs stay in their order; one that does not fit into the row any more begins the next. Each must fit by itself.

    Returns:
      How many rows, and a hash of their content.
    """
    directory.mkdir(parents=True)
    tokens = np.min_scalar_type(vocab_size - 1)
    with (
        NpyWriter(directory / "source.npy", 1, tokens) as sources,
        NpyWriter(directory / "target.npy", 1, tokens) as targets,
        NpyWriter(directory / "ends.npy", 2, np.dtype(np.int64)) as ends,
        NpyWriter(directory / "rows.npy", 1, np.dtype(np.int64)) as rows,
    ):
        end, number, count, row = np.zeros(2, np.int64), 0, 0, [0, 0, 0]
        for chunk in _chunks(pairs):
            full = []
            for source, target in chunk:
                wider = [row[0] + 1, row[1] + len(source), row[2] + len(target)]
                if row[0] and not room.holds(*wider):
                    full.append(number)
                    wider = [1, len(source), len(target)]
                row = wider
                number += 1
            lengths = np.array([[len(source), len(target)] for source, target in chunk], np.int64)
            ends.append(end + lengths.cumsum(axis=0))
            end = end + lengths.sum(axis=0)
            sources.append(np.concatenate([source for source, _ in chunk])[:, None])
            targets.append(np.concatenate([target for _, target in chunk])[:, None])
            rows.append(np.array(full, np.int64)[:, None])
            count += len(full)
        if number:
            rows.append(np.array([[number]]))
            count += 1
        return count, "".join(file.digest() for file in (sources, targets, ends, rows))


class PackedPairs:
    """Random access to the rows of one split: `rows[i]` is a dict of int32 arrays by `COLUMNS`.

    source: token ids [source_length]. target: [target_length + 1]. *_segments: number of the pair inside the row, from
    1, the same on both sides; 0 is padding. *_positions: place inside the segment, from 0. Memory-mapped on first use,
    so that a pickled copy carries only the path.
    """

    def __init__(self, directory: Path, room: Room):
        self._directory, self._room = directory, room

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        # asarray sheds the memmap subclass, whose every slice costs microseconds; the memory stays mapped.
        return {
            name: np.asarray(np.load(self._directory / f"{name}.npy", mmap_mode="r", allow_pickle=False))
            for name in ("source", "target", "ends", "rows")
        }

    def __getstate__(self) -> dict[str, Any]:
        return {"_directory": self._directory, "_room": self._room}

    def __repr__(self) -> str:
        return f"PackedPairs({self._directory})"

    def __len__(self) -> int:
        return len(self._arrays["rows"])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows, ends = self._arrays["rows"], self._arrays["ends"]
        first, last = (int(rows[index - 1, 0]) if index else 0), int(rows[index, 0])
        bounds = [(0, 0)] * (first == 0) + ends[max(first - 1, 0) : last].tolist()
        row = {}
        for side, (name, length, before) in enumerate(
            [("source", self._room.source_length, 0), ("target", self._room.target_length + 1, 1)]
        ):
            tokens, segments, used = np.full(length, END, np.int32), np.zeros(length, np.int32), 0
            for number in range(1, len(bounds)):
                start, stop = bounds[number - 1][side], bounds[number][side]
                wide = before + stop - start + 1
                tokens[used + before : used + wide - 1] = self._arrays[name][start:stop, 0]
                segments[used : used + wide] = number
                used += wide
            row |= {name: tokens, f"{name}_segments": segments, f"{name}_positions": positions(segments)}
        return row


def _chunks(pairs: Iterable[TokenPair]) -> Iterator[list[TokenPair]]:
    chunk: list[TokenPair] = []
    for pair in pairs:
        chunk.append(pair)
        if len(chunk) == _PAIRS_PER_WRITE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
