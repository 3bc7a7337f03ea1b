"""Documents into rows of one length, ahead of time, so that a batch is a pure function of its step.

Every row is filled to its end: a document that does not fit goes on in the next row as a new segment, whose first
token repeats the last one of the row before. Inputs are `row[:-1]` and targets `row[1:]`, and a target counts where
its segment is its input's; so every token of every document, and its end, is predicted exactly once.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .records import Rejects

Row = tuple[np.ndarray, np.ndarray]
_ROWS_PER_WRITE = 1024


def pack(documents: Iterable[np.ndarray], row_length: int) -> Iterator[Row]:
    """Rows (tokens, segments), each int32 [row_length], from documents int32 [length >= 2].

    Segments count the documents in a row from 1; 0 marks padding: at most one slot at the end of a row, and what is
    left of the last row.
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
    """Which slots of rows [..., row_length] are predicted, bool of the same shape; the first slot never is."""
    real = np.zeros(segments.shape, bool)
    real[..., 1:] = (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)
    return real


def positions(segments: np.ndarray) -> np.ndarray:
    """The place of each slot of a row inside its segment, from 0: int32 [row_length]."""
    slots = np.arange(len(segments), dtype=np.int32)
    starts = np.diff(segments, prepend=-1) != 0
    return slots - np.maximum.accumulate(np.where(starts, slots, 0))


def write_rows(directory: Path, rows: Iterable[Row], row_length: int, vocab_size: int) -> tuple[int, str]:
    """Stream rows to `directory`/tokens.npy and segments.npy, [rows, row_length] each.

    Returns:
      How many, and a hash of their content.
    """
    directory.mkdir(parents=True)
    count = 0
    with (
        NpyWriter(directory / "tokens.npy", row_length, np.min_scalar_type(vocab_size - 1)) as tokens,
        NpyWriter(directory / "segments.npy", row_length, np.min_scalar_type(row_length)) as segments,
    ):
        for chunk in _chunks(rows, _ROWS_PER_WRITE):
            tokens.append(np.stack([row[0] for row in chunk]))
            segments.append(np.stack([row[1] for row in chunk]))
            count += len(chunk)
    return count, tokens.digest() + segments.digest()


class NpyWriter:
    """A two-dimensional .npy file written row by row; numpy pads the header so that the count can grow in place."""

    def __init__(self, path: Path, columns: int, dtype: np.dtype):
        self._file = path.open("wb")
        self._columns, self._dtype, self._rows = columns, dtype, 0
        self._hash = hashlib.sha256(f"{dtype} {columns}".encode())
        self._write_header()

    def _write_header(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._file, header | {"shape": (self._rows, self._columns)})

    def append(self, rows: np.ndarray) -> None:
        """Add rows [n, columns]."""
        content = np.ascontiguousarray(rows, self._dtype).tobytes()
        self._file.write(content)
        self._hash.update(content)
        self._rows += len(rows)

    def digest(self) -> str:
        """Hash of the rows so far, their length and their type."""
        return self._hash.hexdigest()

    def __enter__(self) -> "NpyWriter":
        return self

    def __exit__(self, *_: object) -> None:
        end = self._file.tell()
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() + self._rows * self._columns * self._dtype.itemsize == end
        self._file.close()


COLUMNS = ("tokens", "segments", "positions", "characters")


class PackedRows:
    """Random access to the rows of one split: `rows[i]` is a dict of int32 [row_length] arrays.

    tokens: ids. segments: number of the document inside the row, from 1; 0 is padding. positions: place inside the
    segment, from 0. characters: how many characters begin in a token, 0 where the token is no target.
    Memory-mapped on first use, so that a pickled copy carries only the path.
    """

    def __init__(self, directory: Path, characters: Path):
        self._directory, self._characters = directory, characters

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # asarray sheds the memmap subclass, whose every slice costs microseconds; the memory stays mapped.
        tokens, segments = (
            np.load(self._directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("tokens", "segments")
        )
        return np.asarray(tokens), np.asarray(segments), np.load(self._characters, allow_pickle=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"_directory": self._directory, "_characters": self._characters}

    def __repr__(self) -> str:
        return f"PackedRows({self._directory})"

    def __len__(self) -> int:
        return len(self._arrays[0])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        all_tokens, all_segments, characters = self._arrays
        tokens, segments = all_tokens[index].astype(np.int32), all_segments[index].astype(np.int32)
        return {
            "tokens": tokens,
            "segments": segments,
            "positions": positions(segments),
            "characters": np.where(real_targets(segments), characters[tokens], 0),
        }


class Progress:
    """One line on stderr that counts documents and tokens: rewritten on a terminal, elsewhere printed at the end.

    `rejects` are those of the pass that it shows; `noun` is what is counted.
    """

    def __init__(self, label: str, rejects: Rejects, noun: str = "documents"):
        self._label, self._rejects, self._noun = label, rejects, noun
        self._documents = self._tokens = self.characters = 0
        self._begun = self._shown = time.monotonic()

    def add(self, characters: int, tokens: int) -> None:
        """Count one document."""
        self._documents += 1
        self.characters += characters
        self._tokens += tokens
        if sys.stderr.isatty() and time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            print(f"\r{self._line()}", end="", file=sys.stderr, flush=True)

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._begun, 1e-3)
        return (
            f"{self._label}: {self._documents:,} {self._noun}, {self.characters:,} characters, {self._tokens:,} tokens "
            f"({self._tokens / seconds / 1e6:.2f} M tokens/s)"
            + (f", {self._rejects.count:,} malformed skipped" if self._rejects.count else "")
        )

    def finish(self, rows: int, row_length: int) -> dict[str, Any]:
        """Print the totals and return them."""
        start = "\r" if sys.stderr.isatty() else ""
        print(f"{start}{self._line()} -> {rows:,} rows of {row_length:,}", file=sys.stderr, flush=True)
        return {
            self._noun: self._documents,
            "characters": self.characters,
            "tokens": self._tokens,
            "rows": rows,
            "malformed": self._rejects.to_json(),
        }


def write_atomically(path: Path, text: str) -> None:
    """Put `text` at `path`; a reader sees all of it or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


class AtomicDirectory:
    """`with AtomicDirectory(path) as partial`: fill `partial`; it becomes `path` when the block ends without an error.

    Leftovers of a killed process are removed. One writer at a time.
    """

    def __init__(self, path: Path):
        self._path, self._partial = path, path.with_name(path.name + ".partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        return self._partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            os.replace(self._partial, self._path)
        else:
            shutil.rmtree(self._partial)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def _chunks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
