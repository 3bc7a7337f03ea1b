"""Progress of a preparation on stderr: fraction done, records and rows per second, time left."""

import datetime
import sys
import threading
import time
from collections.abc import Iterable, Iterator, MutableSequence, Sequence
from typing import TypeVar

from ..reading.sources import Stream

T = TypeVar("T")
FIELDS = 3  # of each worker: fraction done, records, rows
_EVERY_SECONDS = 10.0


class WorkerCounter:
    """Counts what one worker does, in its part of an array that all processes share."""

    def __init__(self, counters: MutableSequence[float], worker: int, streams: Sequence[Stream]):
        self._counters, self._at = counters, FIELDS * worker
        self._total, self._finished = sum(stream.weight for stream in streams), 0.0

    def records(self, stream: Stream, records: Iterable[T]) -> Iterator[T]:
        """Pass records through and count them."""
        for record in records:
            self._counters[self._at] = (self._finished + stream.weight * stream.fraction()) / self._total
            self._counters[self._at + 1] += 1
            yield record

    def rows(self, rows: Iterable[T]) -> Iterator[T]:
        """Pass rows through and count them."""
        for row in rows:
            self._counters[self._at + 2] += 1
            yield row

    def finish(self, stream: Stream) -> None:
        """Count a stream as done."""
        self._finished += stream.weight
        self._counters[self._at] = self._finished / self._total


class ProgressLines:
    """Prints a line about the counters of all workers every 10 seconds, from a thread, while its context lasts."""

    def __init__(self, noun: str, counters: Sequence[float]):
        self._noun, self._counters = noun, counters
        self._began, self._stop = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "ProgressLines":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def __str__(self) -> str:
        """Return the records and rows made here, with their pace."""
        records, rows = (int(sum(self._counters[field::FIELDS])) for field in (1, 2))
        seconds = max(time.monotonic() - self._began, 1e-3)
        return (
            f"{records:,} {self._noun} ({records / seconds:,.0f}/s), {rows:,} rows ({rows / seconds:,.0f}/s) in "
            f"{datetime.timedelta(seconds=round(seconds))}"
        )

    def _run(self) -> None:
        while not self._stop.wait(_EVERY_SECONDS):
            done = self._counters[::FIELDS]
            fraction = max(sum(done) / len(done), 1e-9)
            left = (time.monotonic() - self._began) * (1 / fraction - 1)
            print(f"preparing: {fraction:.1%}, {self}, about {left / 60:,.0f} min left", file=sys.stderr, flush=True)
