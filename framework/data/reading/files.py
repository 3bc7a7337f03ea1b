"""Files, local or in a bucket, read as a stream, decompressed where their name ends in .xz or .gz; never held whole."""

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


class Meter:
    """How much of some files a stream has read; compressed ones count as they lie on disk."""

    def __init__(self, files: Sequence[epath.Path]):
        self._sizes = {path: path.stat().length for path in files}
        self._before: dict[epath.Path, int] = {}
        so_far = 0
        for path, size in self._sizes.items():
            self._before[path] = so_far
            so_far += size
        self._total, self._read = so_far, 0

    def at(self, path: epath.Path, place: int) -> None:
        """The stream is at a place of a file."""
        self._read = self._before[path] + place

    def share(self) -> float:
        """From 0 to 1."""
        return self._read / max(self._total, 1)


def found(pattern: str) -> list[epath.Path]:
    """The files that a glob matches, in the order of their paths."""
    if paths.is_local(pattern):
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
        return [epath.Path(match) for match in sorted(matches) if os.path.isfile(match)]
    scheme, _, rest = pattern.partition("://")
    root, _, rest = rest.partition("/")
    return sorted(path for path in epath.Path(f"{scheme}://{root}").glob(rest) if path.is_file())


def matching(pattern: str, example: str) -> list[epath.Path]:
    """The files that a glob matches, in the order of their paths.

    Args:
      pattern: what stands behind "file:" in `data.source`.
      example: a glob for the files wanted, such as "*.txt", to advise with where the pattern is a directory.

    Raises:
      UserError: there is none, or one may not be read.
    """
    files = found(pattern)
    if not files:
        is_folder = paths.is_local(pattern) and glob.glob(os.path.expanduser(pattern))
        hint = f"; for the files in a directory write file:{pattern.rstrip('/')}/{example}" if is_folder else ""
        raise UserError(f"data.source 'file:{pattern}' matches no file{hint or '; check the path'}")
    refuse_unreadable(files)
    return files


def refuse_unreadable(files: Sequence[epath.Path]) -> None:
    """Raise UserError for a local file that may not be read."""
    for path in files:
        if paths.is_local(path) and not os.access(path, os.R_OK):
            raise UserError(f"data file {path} cannot be read; check its permissions (chmod +r)")


def stats(files: Sequence[epath.Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of change of each file: other stats, perhaps other content."""
    return [(os.fspath(path), *_stat(path)) for path in files]


def _stat(path: epath.Path) -> tuple[int, int]:
    if paths.is_local(path):
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    stat = path.stat()  # of a bucket, in whole seconds
    return stat.length, stat.mtime


def records(path: epath.Path, separator: bytes, longest: int, meter: Meter | None = None) -> Iterator[bytes | None]:
    """The content of a file cut after every `separator`, one byte; the last record may lack it.

    Of a record with more than `longest` bytes nothing is kept: it is None.

    Raises:
      UserError: the file cannot be read, or is no whole .xz or .gz file.
    """
    pieces: list[bytes] = []
    size = 0
    for chunk in _chunks(path, meter):
        start = 0
        while start < len(chunk):
            end = chunk.find(separator, start) + 1
            piece = chunk[start : end or len(chunk)]
            start += len(piece)
            size += len(piece)
            if size > longest:
                pieces.clear()
            else:
                pieces.append(piece)
            if end:
                yield b"".join(pieces) if pieces else None
                pieces, size = [], 0
    if size:
        yield b"".join(pieces) if pieces else None


def _chunks(path: epath.Path, meter: Meter | None) -> Iterator[bytes]:
    try:
        with path.open("rb") as raw:
            opener = _OPENERS.get(path.suffix)
            file: Any = opener(raw, "rb") if opener else raw
            while chunk := file.read(_CHUNK):
                if meter is not None:
                    meter.at(path, raw.tell())
                yield chunk
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"data file {path} cannot be read ({error}); mend it or leave it out") from error
