"""Write and compare the checksums of a checkpoint's files.

Each process of a run hashes the files that it has written, after the checkpoint is committed, and lists them in
`SHA256SUMS-<process>-of-<processes>`. `cat SHA256SUMS-* | sha256sum --check` compares them without this package.
"""

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from ..base import paths
from ..base.errors import told
from ..base.paths import Path

EVALUATION = "evaluation.json"  # written after the checkpoint, and not covered by its checksums

_SUMS = re.compile(r"SHA256SUMS-(\d+)-of-(\d+)")
_ADDED = re.compile(rf"{re.escape(EVALUATION)}|\..*\.partial")  # and what an interrupted write has left
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)")
_OF_PROCESS = re.compile(r"(?:ocdbt\.)?process_(\d+)")  # folders and files that Orbax names after their writer
_READ_BYTES = 1 << 22
_THREADS = 4  # hashing releases Python's lock, and storage serves several readers faster than one


@dataclasses.dataclass(frozen=True)
class Sums:
    """The checksums of a checkpoint.

    Attributes:
      digests: file -> SHA-256.
      faults: files that are missing or not listed, and sums that cannot be read; one text each.
      complete: whether every process has written its sums. A run that ends between a commit and this leaves them
        incomplete.
    """

    digests: dict[str, str]
    faults: list[str]
    complete: bool


def write(directory: Path, process: int, processes: int) -> None:
    """Hash the files of a committed checkpoint that this process has written, and list them.

    The files are on the disk when this returns, so that older checkpoints may be deleted.
    """
    names = [name for name in _files(directory) if _writer(name, processes) == process]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(functools.partial(_digest, synced=True), (directory / name for name in names))
        lines = [f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True)]
    paths.write_text(directory / f"SHA256SUMS-{process}-of-{processes}", "".join(lines))


def read(directory: Path) -> Sums:
    """Read the checksums of a checkpoint and compare the list of its files, not their content."""
    digests: dict[str, str] = {}
    processes: dict[int, int] = {}
    for path in paths.listed(directory):
        if not (match := _SUMS.fullmatch(path.name)):
            continue
        try:
            text = paths.read_text(path)
        except paths.errors() as error:
            return Sums({}, [f"{path.name} cannot be read ({told(error)})"], complete=True)
        lines = list(map(_LINE.fullmatch, text.splitlines()))
        if not all(lines) or (text and not text.endswith("\n")):
            return Sums({}, [f"{path.name} has a line that is not a checksum"], complete=True)
        digests |= {line[2]: line[1] for line in lines if line}
        processes[int(match[1])] = int(match[2])
    complete = bool(processes) and all(len(processes) == number for number in processes.values())
    files = set(_files(directory))
    faults = [f"{name} is missing" for name in sorted(digests.keys() - files)]
    if complete:
        faults += [f"{name} has no checksum" for name in sorted(files - digests.keys())]
    return Sums({name: digest for name, digest in sorted(digests.items()) if name in files}, faults, complete)


def mismatches(directory: Path, digests: Mapping[str, str]) -> list[str]:
    """Read files and return those that differ from their checksums, one text each."""
    with ThreadPoolExecutor(_THREADS) as pool:
        verdicts = pool.map(_verdict, (directory / name for name in digests), digests.values())
        return [f"{name} {verdict}" for name, verdict in zip(digests, verdicts, strict=True) if verdict]


def size(directory: Path) -> int:
    """Return the bytes of a checkpoint's files, without its checksums."""
    found = paths.files(directory)
    return sum(found[name] for name in _listed(found))


def _verdict(path: Path, digest: str) -> str:
    if paths.is_local(path) and not os.path.isfile(path):
        return "is not a file"  # opening a pipe or a device may block
    try:
        return "" if _digest(path) == digest else "does not have its checksum"
    except paths.errors() as error:
        return f"cannot be read ({told(error)})"


def _digest(path: Path, *, synced: bool = False) -> str:
    with path.open("rb") as file:
        if synced and paths.is_local(path):
            os.fsync(file.fileno())
        digest = hashlib.sha256()
        while part := file.read(_READ_BYTES):
            digest.update(part)
        return digest.hexdigest()


def _writer(name: str, processes: int) -> int:
    """Return the process that writes a file; those that Orbax does not name after a process are of process 0."""
    numbers = [int(match[1]) for part in name.split("/") if (match := _OF_PROCESS.fullmatch(part))]
    return numbers[0] if numbers and numbers[0] < processes else 0


def _files(directory: Path) -> list[str]:
    """Return the sorted relative paths of all files that have checksums."""
    return _listed(paths.files(directory))


def _listed(names: Iterable[str]) -> list[str]:
    return [name for name in names if not (_SUMS.fullmatch(name) or _ADDED.fullmatch(name))]
