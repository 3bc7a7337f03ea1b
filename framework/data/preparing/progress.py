"""Progress of a preparation on stderr: fraction done, records and rows per second, time left."""

import datetime
import sys
import threading
import time
from collections.abc import Iterable, Iterator, MutableSequence
from typing import TypeVar

from .streams import Stream

T = TypeVar("T")
FIELDS = 3  # of each worker: fraction done, records, rows
_EVERY_SECONDS = 10.0  # between lines; a terminal's line is rewritten more often
_REWRITE_SECONDS = 0.5
_WINDOW_SECONDS = 60.0  # over which the pace is measured


class WorkerCounter:
    """Counts what one worker does, in its part of an array that all processes share."""

    def __init__(self, counters: MutableSequence[float], worker: int, streams: Iterable[Stream]):
        self._counters, self._at = counters, FIELDS * worker
        self._total = sum(stream.weight for stream in streams)
        self._finished = 0.0

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

    def __init__(self, noun: str, counters: MutableSequence[float]):
        self._noun, self._counters = noun, counters
        self._began, self._stop = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "ProgressLines":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def summary(self) -> str:
        """Return the line that ends a preparation."""
        _, records, rows = self._sums()
        return f"made here: {self._pace(records, rows)} in {time.monotonic() - self._began:,.1f} s"

    def _run(self) -> None:
        rewrite = sys.stderr.isatty()
        past = [(self._began, 0.0)]
        while not self._stop.wait(_REWRITE_SECONDS if rewrite else _EVERY_SECONDS):
            now, (fraction, records, rows) = time.monotonic(), self._sums()
            past.append((now, fraction))
            while len(past) > 2 and now - past[1][0] > _WINDOW_SECONDS:
                past.pop(0)
            pace = (fraction - past[0][1]) / (now - past[0][0])
            left = (
                f"{datetime.timedelta(seconds=round((1 - fraction) / pace))} left" if pace > 0 else "time left unknown"
            )
            line = f"preparing: {fraction:.1%}, {self._pace(records, rows)}, {left}"
            print(f"\r{line}" if rewrite else line, end="" if rewrite else "\n", file=sys.stderr, flush=True)
        if rewrite and len(past) > 1:
            print(file=sys.stderr)

    def _sums(self) -> tuple[float, int, int]:
        fractions, records, rows = (list(self._counters[field::FIELDS]) for field in range(FIELDS))
        return sum(fractions) / len(fractions), int(sum(records)), int(sum(rows))

    def _pace(self, records: int, rows: int) -> str:
        seconds = max(time.monotonic() - self._began, 1e-3)
        return f"{records:,} {self._noun} ({records / seconds:,.0f}/s), {rows:,} rows ({rows / seconds:,.0f}/s)"
