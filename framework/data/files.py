"""Local files read as a stream, decompressed where their name ends in .xz or .gz; never held whole."""

import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError

_CHUNK = 1 << 20
_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}


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
