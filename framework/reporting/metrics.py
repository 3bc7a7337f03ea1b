"""Write measurements to the workdir: JSON lines for programs, TensorBoard events for browsers."""

import json
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..base import workdir as layout
from .runs import parse_point


class MetricsWriter:
    """Write one line of `metrics.jsonl` per call, and the same numbers as TensorBoard events.

    One process of a run writes. When a run resumes, lines after its checkpoint are dropped, so that its history equals
    that of an uninterrupted run.
    """

    def __init__(self, workdir: Path, *, after_step: int, evaluated: bool):
        """Drop the lines after `after_step`; those of its evaluation too unless `evaluated`."""
        self._path = workdir / layout.METRICS
        self._workdir = workdir
        # The import of TensorBoard takes up to seconds; in a thread it delays no step.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tensorboard")
        self._events: Any = None
        self._pending: list[Future[None]] = []
        self.drop_after(after_step, evaluated=evaluated)

    def write(self, *, step: int, seconds: float, tokens: int, values: Mapping[str, float]) -> None:
        """Append the measurements after `step`. A number that is not finite becomes null."""
        line = {"step": step, "seconds": round(seconds, 3), "tokens": tokens} | {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._pending.append(self._thread.submit(self._write_events, step, dict(values)))

    def drop_after(self, step: int, *, evaluated: bool) -> None:
        """Drop the lines after a step. Unless `evaluated`, drop its evaluation too, which will be repeated."""
        if not self._path.exists():
            return
        points = ((line, parse_point(line)) for line in self._path.read_text(errors="replace").splitlines())
        kept = [line for line, point in points if point is not None and _stays(point, step, evaluated)]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        partial.replace(self._path)

    def close(self) -> None:
        """Wait until everything is written, and raise errors of the background thread."""
        self._pending.append(self._thread.submit(self._close_events))
        self._thread.shutdown()
        for written in self._pending:
            written.result()

    def _write_events(self, step: int, values: dict[str, float]) -> None:
        # clu's writer needs TensorFlow, which takes 1.3 GB on disk.
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._events is None:
            self._events = EventFileWriter(str(self._workdir))
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        self._events.flush()

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()


def _stays(point: Mapping[str, Any], step: int, evaluated: bool) -> bool:
    """Return whether a line belongs to the history of a run that resumes after `step`."""
    if point["step"] != step or evaluated:
        return point["step"] <= step
    return not any(name.startswith("heldout/") for name in point)
