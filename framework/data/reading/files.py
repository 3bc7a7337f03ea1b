"""Files, local or in a bucket, read as streams and decompressed if their names end in .xz or .gz; never held whole."""

import glob
import gzip
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from ...base import paths
from ...base.errors import UserError

_CHUNK = 1 << 20
_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
COMPRESSED = frozenset(_OPENERS)


class ReadMeter:
    """Tracks the fraction of some files that a stream has read, by compressed size."""

    def __init__(self, files: Sequence[epath.Path]):
        self._before: dict[epath.Path, int] = {}
        self._total = self._read = 0
        for path in files:
            self._before[path] = self._total
            self._total += path.stat().length

    def at(self, path: epath.Path, offset: int) -> None:
        """Note that the stream has reached a byte offset of a file."""
        self._read = self._before[path] + offset

    def fraction(self) -> float:
        """Return the fraction read, 0 to 1."""
        return self._read / max(self._total, 1)


def find(knob: str, pattern: str, example: str = "*") -> list[epath.Path]:
    """Return the files that a glob matches, sorted by path.

    Args:
      knob: the knob that the pattern comes from, for errors: "data.source".
      pattern: a glob, local or gs://.
      example: a glob for wanted files, such as "*.txt"; the error for a directory suggests it.

    Raises:
      UserError: no file matches, or one may not be read.
    """
    is_local = paths.is_local(pattern)
    if is_local:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        found = [epath.Path(match) for match in matches if os.path.isfile(match)]
    else:
        matches = []
        scheme, _, rest = pattern.partition("://")
        root, _, rest = rest.partition("/")
        found = sorted(path for path in epath.Path(f"{scheme}://{root}").glob(rest) if path.is_file())
    if not found:
        fix = (
            f"For the files in a directory, write file:{pattern.rstrip('/')}/{example}."
            if matches
            else "Check the path."
        )
        raise UserError(f"{knob}: {pattern!r} matches no file. {fix}")
    for path in found:
        if is_local and not os.access(path, os.R_OK):
            raise UserError(f"data file {path}: cannot be read. Check its permissions (chmod +r).")
    return found


def stats(files: Sequence[epath.Path]) -> list[tuple[str, int, int]]:
    """Return path, size and modification time of each file; they change when the content may have changed."""
    return [(os.fspath(path), *_stat(path)) for path in files]


def _stat(path: epath.Path) -> tuple[int, int]:
    if paths.is_local(path):
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    stat = path.stat()  # in a bucket, in whole seconds
    return stat.length, stat.mtime


def pieces(path: epath.Path, separator: bytes, longest: int, meter: ReadMeter | None = None) -> Iterator[bytes | None]:
    """Yield the content of a file, cut after every `separator` (one byte); the last piece may lack it.

    A piece of more than `longest` bytes is not held in memory: None takes its place.

    Raises:
      UserError: the file cannot be read, or is a damaged .xz or .gz file.
    """
    held: list[bytes] = []
    size = 0
    for chunk in _chunks(path, meter):
        start = 0
        while start < len(chunk):
            end = chunk.find(separator, start) + 1
            part = chunk[start : end or len(chunk)]
            start += len(part)
            size += len(part)
            if size > longest:
                held.clear()
            else:
                held.append(part)
            if end:
                yield b"".join(held) if held else None
                held, size = [], 0
    if size:
        yield b"".join(held) if held else None


def _chunks(path: epath.Path, meter: ReadMeter | None) -> Iterator[bytes]:
    try:
        with path.open("rb") as raw:
            opener = _OPENERS.get(path.suffix)
            file: Any = opener(raw, "rb") if opener else raw
            while chunk := file.read(_CHUNK):
                if meter is not None:
                    meter.at(path, raw.tell())
                yield chunk
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"data file {path}: cannot be read ({error}). Replace or remove it.") from error
