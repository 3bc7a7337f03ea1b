"""Local files read as a stream, decompressed where their name ends in .xz or .gz; never held whole."""

import glob
import gzip
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError

_CHUNK = 1 << 20
_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}


def matching(pattern: str, example: str) -> list[Path]:
    """The files that a glob matches, in the order of their paths.

    Args:
      pattern: what stands behind "file:" in `data.source`.
      example: a glob for the files wanted, such as "*.txt", to advise with where the pattern is a directory.

    Raises:
      UserError: there is none, or one may not be read.
    """
    matches = glob.glob(os.path.expanduser(pattern), recursive=True)
    paths = [Path(match) for match in sorted(matches) if os.path.isfile(match)]
    if not paths:
        hint = f"; for the files in a directory write file:{pattern.rstrip('/')}/{example}" if matches else ""
        raise UserError(f"data.source 'file:{pattern}' matches no file{hint or '; check the path'}")
    for path in paths:
        if not os.access(path, os.R_OK):
            raise UserError(f"data file {path} cannot be read; check its permissions (chmod +r)")
    return paths


def stats(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of change of each file: other stats, perhaps other content."""
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def records(path: Path, separator: bytes, longest: int) -> Iterator[bytes | None]:
    """The content of a file cut after every `separator`, one byte; the last record may lack it.

    Of a record with more than `longest` bytes nothing is kept: it is None.

    Raises:
      UserError: the file cannot be read, or is no whole .xz or .gz file.
    """
    pieces: list[bytes] = []
    size = 0
    for chunk in _chunks(path):
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


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"data file {path} cannot be read ({error}); mend it or leave it out") from error
