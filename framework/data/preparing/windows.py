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

_BITS = 32  # an index is the number of a window and, in so many bits, a row of it
_LEN = 2**56
_OPEN = 4  # windows held open; threads read from two or three
_READERS = 32
_LOOK, _SAY = 0.2, 10.0  # seconds between looks for a shard, and until the first message
ENDLESS = 2**62  # number of the examples of an order that only knows shards


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
        self._missing: int | None = None  # the shard that is waited for
        self._since, self._due, self._looked = 0.0, 0.0, -math.inf  # since when, when to say so, last look for it
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

    def made(self, position: int) -> int:
        """Return how many examples of the order can be read without waiting, as far as example `position` needs it."""
        with self._lock:
            while not self._whole and position >= self._ends[-1] and self._extend():
                pass
        return ENDLESS if self._whole else self._ends[-1]

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
        """Wait for windows until there are enough, or all.

        Raises:
          UserError: `stop` was called.
        """
        while not self._whole and not enough():
            with self._lock:
                while not self._whole and not enough() and self._extend():
                    pass
            if not self._whole and not enough() and self._stopped.wait(_LOOK):
                raise UserError(f"{self._folder}: reading has ended before shard {_name(self._missing or 0)} existed")

    def _extend(self) -> bool:
        """Add the next window, or note the end, and return True; False if shards of the window do not exist yet."""
        first = len(self._windows) * self._size
        rows = self._known[first : first + self._size] if self._ends[-1] < self._wanted else []
        if self._making and len(rows) < self._size and self._ends[-1] < self._wanted:
            if time.monotonic() < self._looked + _LOOK:  # another thread has
                return False
            rows = self._found(first)
            if first + len(rows) < min(first + self._size, self._end()):
                self._say_missing(first + len(rows))
                return False
        if rows:
            self._windows.append(rows)
            self._ends.append(self._ends[-1] + sum(rows))
        self._whole = len(rows) < self._size
        return True

    def _found(self, first: int) -> list[int]:
        """Return the rows of the shards of a window up to the first that does not exist."""
        with ThreadPoolExecutor(_READERS) as pool:
            counts = [*pool.map(self._note, range(first, first + self._size)), None]
        return [count for count in counts[: counts.index(None)] if count is not None]

    def _say_missing(self, number: int) -> None:
        """Say from time to time which shard is waited for."""
        self._looked = now = time.monotonic()
        if number != self._missing:
            self._missing, self._since, self._due = number, now, _SAY
        if now - self._since >= self._due:
            self._due *= 2
            who = f"process {self._process} waits for shard {_name(number)} of {self._folder}"
            print(f"{who}, which process 0 makes: {now - self._since:.0f} s", file=sys.stderr, flush=True)

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
