"""The progress of a preparation on stderr: share, records and rows a second, and time left."""

import sys
import time
from typing import Any

from ..reading.records import Rejects

_EVERY_SECONDS = 10.0  # between lines; on a terminal one line is rewritten
_REWRITTEN_SECONDS = 0.5
_WINDOW_SECONDS = 60.0  # that the pace is taken over


class Progress:
    """Adds up what workers tell and shows it.

    Args:
      noun: what records are called.
      workers: how many tell.
      max_malformed: records of a split that may be skipped, of all workers together.
    """

    def __init__(self, noun: str, workers: int, max_malformed: int):
        self._noun, self._limit = noun, max_malformed
        self._ticks: list[tuple[float, int, int]] = [(0.0, 0, 0)] * workers
        self._rejects: dict[Any, Rejects] = {}
        self._begun = self._shown = time.monotonic()
        self._past = [(self._begun, 0.0)]

    def hear(self, worker: int, kind: str, content: Any) -> None:
        """Take a message of `Job.work`.

        Raises:
          UserError: a split has more malformed records than may be skipped.
        """
        if kind == "shard":
            rejects = Rejects(self._limit, **content["malformed"])
            self._rejects[content["split"]] = rejects.after(self._rejects.get(content["split"], Rejects(self._limit)))
            self._rejects[content["split"]].refuse_excess()
            return
        self._ticks[worker] = content
        now = time.monotonic()
        if now - self._shown >= (_REWRITTEN_SECONDS if sys.stderr.isatty() else _EVERY_SECONDS):
            self._shown = now
            self._print(self._line(now), end="" if sys.stderr.isatty() else "\n")

    def finish(self, splits: dict[str, dict[str, Any]]) -> None:
        """Print the totals of each split, and the pace of what was made here."""
        for name, total in splits.items():
            counted = ", ".join(f"{count:,} {what}" for what, count in total.items() if isinstance(count, int))
            self._print(f"prepared {name}: {counted}")
        _, records, rows = self._sum()
        seconds = max(time.monotonic() - self._begun, 1e-3)
        self._print(
            f"made here: {records:,} {self._noun} into {rows:,} rows in {seconds:,.1f} s "
            f"({records / seconds:,.0f} {self._noun}/s, {rows / seconds:,.0f} rows/s)"
        )

    def _sum(self) -> tuple[float, int, int]:
        shares, records, rows = zip(*self._ticks, strict=True)
        return sum(shares) / len(shares), sum(records), sum(rows)

    def _line(self, now: float) -> str:
        share, records, rows = self._sum()
        self._past.append((now, share))
        while len(self._past) > 2 and now - self._past[1][0] > _WINDOW_SECONDS:
            self._past.pop(0)
        (then, before), seconds = self._past[0], max(now - self._begun, 1e-3)
        pace = (share - before) / max(now - then, 1e-3)
        left = f"{_clock((1 - share) / pace)} left" if pace > 0 else "time left unknown"
        return (
            f"preparing: {share:.1%}, {records:,} {self._noun} ({records / seconds:,.0f}/s), {rows:,} rows "
            f"({rows / seconds:,.0f} rows/s), {left}"
        )

    def _print(self, line: str, end: str = "\n") -> None:
        print(f"{chr(13) if sys.stderr.isatty() else ''}{line}", end=end, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
