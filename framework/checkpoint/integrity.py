"""Checksums of a directory: SHA256SUMS, in the form of `sha256sum`, which makes the directory whole.

The file is written last. Until it is there the directory counts as unfinished, and after that any file that is missing,
added, cut short or changed is found. `cd DIRECTORY && sha256sum --check SHA256SUMS` finds the same without us.
"""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SUMS = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)")
_THREADS = 4  # hashing lets other threads run, and storage is seldom at its best with one reader


def is_sealed(directory: Path) -> bool:
    """Whether a directory has its checksums, be they right or not."""
    return (directory / SUMS).is_file()


def seal(directory: Path) -> int:
    """Write the checksums of all files in `directory`, durably and at once; returns how many bytes these hold."""
    files = _files(directory)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(_digest, (directory / name for name in files)))
    partial = directory / f"{SUMS}.partial"
    with partial.open("w") as file:
        file.writelines(f"{digest}  {name}\n" for digest, name in zip(digests, files, strict=True))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / SUMS)
    return sum((directory / name).stat().st_size for name in files)


def faults(directory: Path, *, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a sealed directory, one short text for each file; empty where nothing is.

    Args:
      directory: the directory.
      part: of the work, which several readers may share: it begins with file number `part`,
      parts: and goes on with every `parts`-th.
    """
    if not is_sealed(directory):
        return [f"no {SUMS}: its save did not come to an end"]
    try:
        text = (directory / SUMS).read_text(encoding="utf-8")
        lines = text.splitlines()
        listed = {match[2]: match[1] for match in map(_LINE.fullmatch, lines) if match}
    except (OSError, UnicodeDecodeError) as error:
        return [f"{SUMS} cannot be read ({error})"]
    if len(listed) != len(lines) or not text.endswith("\n"):
        return [f"{SUMS} has a line that is no checksum"]
    there = set(_files(directory))
    found = [f"{name} is missing" for name in sorted(listed.keys() - there)]
    found += [f"{name} is not in {SUMS}" for name in sorted(there - listed.keys())]
    names = sorted(there & listed.keys())[part::parts]
    with ThreadPoolExecutor(_THREADS) as pool:
        verdicts = pool.map(lambda name: _fault(directory / name, listed[name]), names)
        return found + [f"{name} {verdict}" for name, verdict in zip(names, verdicts, strict=True) if verdict]


def size(directory: Path) -> int:
    """Bytes in the files of a directory, checksums left out."""
    return sum((directory / name).stat().st_size for name in _files(directory))


def _fault(path: Path, expected: str) -> str:
    if not path.is_file():
        return "is no file"  # to open a pipe or a device may take for ever
    try:
        return "" if _digest(path) == expected else "does not have its checksum"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(directory: Path) -> list[str]:
    """Relative paths of all files, the checksums' own left out, sorted."""
    paths = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())
    return sorted(path for path in paths if path not in (SUMS, f"{SUMS}.partial"))
