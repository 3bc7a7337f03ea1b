"""Training rows in windows of consecutive shards, read while later shards are still being made.

Windows are trained on one after the other; within a window the rows have an order of their own in every epoch. Which
rows a batch has is therefore a function of the seed, its number and the shards up to its window, and needs no others.
"""

import bisect
import functools
import itertools
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath, epy

from ...base.errors import UserError
from ...dataset import Example
from ..reading import shards
from . import manifests

with epy.lazy_imports():
    import grain

FAILED = "failed.txt"  # why the process that makes shards has ended
_BITS = 32  # an index is the number of a window and, in so many bits, a row of it
_LEN = 2**56
_OPEN = 4  # windows held open; threads read from two or three
_READERS = 32
_LOOK, _SAY = 0.2, 10.0  # seconds between looks for a shard, and until the first message


class Windows:
    """Training rows of the shards train-00000, train-00001, ... of a folder, whose number is not known yet.

    Reading an order waits for the shards of its window. `len` is an upper bound of the indices.

    Args:
      folder: the shards and their notes.
      decode: returns the examples of rows.
      size: shards of a window.
      known: rows of the first shards, which exist.
      making: whether further shards are being made; process 0 of the run makes them.
      wanted: rows after which no further window is made; 0 for none.
      process: index of the process that reads, for messages.
    """

    in_workers = True

    def __init__(
        self,
        folder: epath.Path,
        decode: shards.Decode,
        size: int,
        known: Sequence[int],
        *,
        making: bool,
        wanted: int,
        process: int | None = None,
    ):
        self._folder, self._decode, self._size, self._known = folder, decode, size, list(known)
        self._making, self._wanted = making, wanted or math.inf
        self._process = jax.process_index() if process is None else process
        self._windows: list[list[int]] = []  # rows of the shards of each
        self._ends = [0]  # rows of all windows before
        self._whole = False
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._rows = functools.lru_cache(_OPEN)(self._open)

    def __repr__(self) -> str:
        return f"Windows({self._folder})"

    def __len__(self) -> int:
        return _LEN

    def __reduce__(self) -> tuple[Any, ...]:
        known = self._known if len(self._known) > self._ends[-1] else [*itertools.chain.from_iterable(self._windows)]
        keywords = {"making": self._making, "wanted": self._wanted, "process": self._process}
        return functools.partial(type(self), **keywords), (self._folder, self._decode, self._size, known)

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Return examples, in the order of their indices; raises as `ShardRows.__getitems__`."""
        examples: list[Example] = []
        for window, own in itertools.groupby(indices, lambda index: index >> _BITS):
            examples += self._rows(window).__getitems__([index & (2**_BITS - 1) for index in own])
        return examples

    def order(self, seed: int) -> Any:
        """Return the endless MapDataset of the indices to train on."""
        return grain.MapDataset.range(2**63 - 1).map(functools.partial(self._index, seed)).seed(seed)

    def stop(self) -> None:
        """End the waiting of all threads for shards."""
        self._stopped.set()

    def _index(self, seed: int, position: int) -> int:
        self._extend_until(lambda: position < self._ends[-1])
        epoch, place = divmod(position, self._ends[-1]) if self._whole else (0, position)
        window = bisect.bisect_right(self._ends, place) - 1
        own = _permutation(self._ends[window + 1] - self._ends[window], seed, epoch, window)
        return window << _BITS | own[place - self._ends[window]]

    def _extend_until(self, enough: Callable[[], bool]) -> None:
        while not self._whole and not enough():
            with self._lock:
                if not self._whole and not enough():
                    self._extend()

    def _extend(self) -> None:
        first = len(self._windows) * self._size
        if self._ends[-1] >= self._wanted:
            rows = []
        else:
            rows = self._known[first : first + self._size]
            if self._making and len(rows) < self._size:
                rows = self._wait(first)
        if rows:
            self._windows.append(rows)
            self._ends.append(self._ends[-1] + sum(rows))
        self._whole = len(rows) < self._size

    def _wait(self, first: int) -> list[int]:
        """Return the rows of the shards of a window; fewer than a window's at the end of the source.

        Raises:
          UserError: the shards are not made any more.
        """
        began, due = time.monotonic(), _SAY
        with ThreadPoolExecutor(_READERS) as pool:
            while True:
                found = list(pool.map(self._note, range(first, first + self._size)))
                rows = list[int]()
                for count in found:
                    if count is None:
                        break
                    rows.append(count)
                there = first + len(rows)
                if len(rows) == self._size or there >= self._end():
                    return rows
                if (self._folder / FAILED).exists():
                    raise UserError((self._folder / FAILED).read_text())
                seconds = time.monotonic() - began
                if seconds >= due:
                    due *= 2
                    who = f"process {self._process} waits for shard {_name(there)} of {self._folder}"
                    print(f"{who}, which process 0 makes: {seconds:.0f} s", file=sys.stderr, flush=True)
                if self._stopped.wait(_LOOK):
                    raise UserError(f"{self._folder}: reading has ended before shard {_name(there)} existed")

    def _note(self, number: int) -> int | None:
        """Return the rows of a shard, None if it does not exist."""
        name = _name(number)
        if not (self._folder / f"{name}.json").exists() or not (self._folder / f"{name}{shards.SUFFIX}").exists():
            return None
        return manifests.read(self._folder, f"{name}.json")["rows"]

    def _end(self) -> float:
        """Return the number of shards of the source, infinity if it is not known yet."""
        whole = self._folder / "train.json"
        return manifests.read(self._folder, whole.name)["shards"] if whole.exists() else math.inf

    def _open(self, window: int) -> shards.ShardRows:
        self._extend_until(lambda: window < len(self._windows))
        first, rows = window * self._size, self._windows[window]
        files = {self._folder / f"{_name(first + number)}{shards.SUFFIX}": count for number, count in enumerate(rows)}
        return shards.ShardRows(files, self._decode, 0, sum(rows))


@functools.lru_cache(16)
def _permutation(rows: int, seed: int, epoch: int, window: int) -> Any:
    own = int(np.random.SeedSequence([seed, epoch, window]).generate_state(1)[0])
    return grain.MapDataset.range(rows).shuffle(seed=own)


def _name(number: int) -> str:
    return f"train-{number:05}"
