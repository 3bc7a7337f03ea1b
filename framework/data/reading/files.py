"""Files, local or in a bucket, read as streams and decompressed by the ends of their names; never held whole."""

import bz2
import codecs
import glob
import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import PurePath
from typing import Any

from etils import epath

from ...base import paths
from ...base.errors import UserError
from . import saved

_CHUNK = 1 << 20
_RATIO = 4  # text / its compressed form, about


def _zstd(raw: Any, mode: str) -> Any:
    import pyarrow  # takes 0.3 s; Python has this format from 3.14 on

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")


_OPENERS: dict[str, Any] = {".bz2": bz2.open, ".gz": gzip.open, ".xz": lzma.open, ".zst": _zstd}
COMPRESSED = frozenset(_OPENERS)


def find(knob: str, pattern: str, suffixes: Sequence[str]) -> list[epath.Path]:
    """Return the files that a glob matches, sorted by path; a file under several paths only once.

    A folder that `datasets` has saved stands for its files.

    Args:
      knob: the knob that the pattern comes from, for errors: "data.source".
      pattern: a glob, local or gs://. Leading folders that exist are taken as they are written, like "[v2] corpus".
      suffixes: of files that can be read, in lower case and without compression: (".txt", ""). The first is proposed.

    Raises:
      UserError: no file matches, or one has another suffix.
    """
    if paths.is_local(pattern):
        matches = sorted(map(epath.Path, glob.glob(_literal(os.path.expanduser(pattern)), recursive=True)))
    else:
        scheme, _, rest = pattern.partition("://")
        root, _, rest = rest.partition("/")
        matches = sorted(epath.Path(f"{scheme}://{root}").glob(rest))
    found = [file for path in matches for file in ([path] if path.is_file() else saved.files_of(path))]
    if not found:
        example = f"{pattern.rstrip('/')}/*{suffixes[0]}"
        fix = f"For the files in a directory, write file:{example}." if matches else "Check the path."
        raise UserError(f"{knob}: {pattern!r} matches no file. {fix}")
    for path in found:
        if suffix(path) not in suffixes:
            shown = ", ".join(filter(None, suffixes))
            raise UserError(
                f"{knob}: {path} has the suffix {suffix(path)!r}. Files may end in {shown}, plain or with "
                f"{', '.join(sorted(COMPRESSED))}. Convert or rename it, or write a narrower pattern."
            )
    once: dict[Any, epath.Path] = {}
    for path in found:
        once.setdefault(identity(path), path)
    return list(once.values())


def mixed(found: Sequence[epath.Path]) -> list[epath.Path]:
    """Return files in the order of a hash of their names, so that topics in folders or names mix."""
    return sorted(found, key=lambda path: (hashlib.sha256(path.name.encode()).digest(), path))


def suffix(path: epath.Path) -> str:
    """Return the suffix of a file's content in lower case: ".tsv" for a.TSV.xz, "" for a name without one."""
    name = path.name.lower()
    for compressed in COMPRESSED:
        name = name.removesuffix(compressed)
    return os.path.splitext(name)[1]


def identity(path: epath.Path) -> Any:
    """Return a value that is equal for all paths of one file, such as links to it."""
    if not paths.is_local(path):
        return path
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def _literal(pattern: str) -> str:
    path = PurePath(pattern)
    for part in (path, *path.parents):
        if part.parts and os.path.lexists(part):
            return os.path.join(glob.escape(os.fspath(part)), *path.parts[len(part.parts) :])
    return pattern


def stats(files: Sequence[epath.Path]) -> list[tuple[str, int, int]]:
    """Return path, size and modification time of each file; they change when the content may have changed."""
    # epath knows the time in whole seconds only.
    times = (os.stat(path).st_mtime_ns if paths.is_local(path) else path.stat().mtime for path in files)
    return [(os.fspath(path), path.stat().length, time) for path, time in zip(files, times, strict=True)]


def text_bytes(found: Sequence[epath.Path]) -> int:
    """Return about how many bytes of text some files hold."""
    packed = COMPRESSED | {".parquet"}
    return sum(path.stat().length * (_RATIO if path.suffix.lower() in packed else 1) for path in found)


def pieces(path: epath.Path, separator: bytes, longest: int) -> Iterator[bytes | None]:
    """Yield the content of a file, cut after every `separator` (one byte); the last piece may lack it.

    A byte order mark at the start is dropped. A piece of more than `longest` bytes is not held in memory: None takes
    its place.

    Raises:
      UserError: the file cannot be read, or is a damaged compressed file.
    """
    held: list[bytes] = []
    size = 0
    for chunk in chunks(path):
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


def chunks(path: epath.Path) -> Generator[bytes]:
    """Yield the content of a file as it is read, about a megabyte at once, without a byte order mark at its start.

    Raises:
      UserError: see `pieces`.
    """
    try:
        with path.open("rb") as raw:
            opener = _OPENERS.get(path.suffix)
            file: Any = opener(raw, "rb") if opener else raw
            mark = codecs.BOM_UTF8
            while chunk := file.read(_CHUNK):
                yield chunk.removeprefix(mark)
                mark = b""
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"data file {path}: cannot be read ({error}). Replace or remove it.") from error
