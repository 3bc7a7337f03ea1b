"""Files that grow. In a folder they are appended to; a bucket has no append, and there they consist of parts.

Parts of `metrics.jsonl` are `metrics-00000.jsonl`, `metrics-00001.jsonl` and so on. Readers join them. The last part is
rewritten until it is full.
"""

import re
import time
from collections.abc import Callable

from . import paths
from .paths import Path

_FULL = 4 << 20  # bytes of a part
_SECONDS = 10.0  # between two writes of a part; Google allows one a second


def parts(path: Path) -> list[Path]:
    """Return the file, if it exists, and its parts, in their order."""
    found = paths.listed(path.parent)
    return [each for each in found if each.name == path.name] + [each for each in found if _number(path, each) >= 0]


def lines(path: Path) -> list[str]:
    """Return the lines of a file and its parts, which may be damaged."""
    return [line for each in parts(path) for line in paths.read_text(each).splitlines()]


def keep(path: Path, stays: Callable[[str], bool]) -> None:
    """Drop the other lines of a file and its parts.

    Raises:
      paths.errors(): a part cannot be read or written.
    """
    for each in parts(path):
        text = paths.read_text(each)
        if (kept := "".join(f"{line}\n" for line in text.splitlines() if stays(line))) != text:
            paths.write_text(each, kept)


class Parts:
    """Appends to a file in a bucket. One thread at a time calls its methods.

    Args:
      path: the file.
      head: bytes at the beginning of each part.
    """

    def __init__(self, path: Path, head: bytes = b""):
        self._path, self._head = path, head
        self._next = 1 + max((_number(path, each) for each in parts(path)), default=-1)
        self._content, self._unwritten, self._written = bytearray(head), False, time.monotonic()

    def append(self, content: bytes) -> None:
        """Add bytes, which readers see after `flush`, or at the first call some seconds after the last write."""
        self._content += content
        self._unwritten = True
        if time.monotonic() - self._written >= _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was added.

        Raises:
          paths.errors(): the bucket cannot be written. What was added is kept.
        """
        if not self._unwritten:
            return
        self._written = time.monotonic()
        stem, dot, suffix = self._path.name.rpartition(".")
        part = self._path.with_name(f"{stem}-{self._next:05}{dot}{suffix}")
        part.write_bytes(bytes(self._content))
        self._unwritten = False
        if len(self._content) >= _FULL:
            self._next, self._content = self._next + 1, bytearray(self._head)


def _number(path: Path, part: Path) -> int:
    """Return the number of a part of a file, -1 for other files."""
    stem, dot, suffix = path.name.rpartition(".")
    match = re.fullmatch(rf"{re.escape(stem)}-(\d{{5,}}){re.escape(dot + suffix)}", part.name)
    return int(match[1]) if match else -1
