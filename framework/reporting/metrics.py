"""Write measurements to the workdir: JSON lines for programs, TensorBoard events for browsers.

If the disk or TensorBoard fails, the run warns and continues without these files.
"""

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..base import paths
from ..base import workdir as layout
from ..distributed import console
from .runs import parse_point


class MetricsWriter:
    """Write one line of `metrics.jsonl` per call, and the same numbers as TensorBoard events.

    One process of a run writes. When a run resumes, lines after its checkpoint are dropped, so that its history equals
    that of an uninterrupted run.
    """

    def __init__(self, workdir: Path, *, after_step: int, evaluated: bool):
        """Drop the lines after `after_step`. Unless `evaluated`, drop its evaluation too, which will be repeated."""
        self._path = workdir / layout.METRICS
        # The import of TensorBoard takes up to seconds; in a thread it delays no step.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tensorboard")
        self._events: Any = None
        self._warned: set[str] = set()  # the files that could not be written
        if self._path.exists():
            self._drop_after(after_step, evaluated)

    def write(self, *, step: int, seconds: float, tokens: int, values: Mapping[str, float]) -> None:
        """Append the measurements after `step`. A number that is not finite becomes null."""
        line = {"step": step, "seconds": round(seconds, 3), "tokens": tokens} | {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }
        try:
            with self._path.open("a") as file:
                # A line that a full disk has cut short ends here, and readers skip it.
                file.write(("\n" if self._path.name in self._warned else "") + json.dumps(line) + "\n")
        except OSError as error:
            self._warn(self._path.name, error)
        self._thread.submit(self._write_events, step, dict(values))

    def _drop_after(self, step: int, evaluated: bool) -> None:
        try:
            lines = self._path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if (point := parse_point(line)) and _stays(point, step, evaluated)]
            paths.write_text(self._path, "".join(line + "\n" for line in kept))
        except OSError as error:
            self._warn(self._path.name, error)

    def close(self) -> None:
        """Wait until everything is written."""
        self._thread.shutdown()
        if self._events:
            with contextlib.suppress(OSError):  # each event is flushed as it is written
                self._events.close()

    def _write_events(self, step: int, values: dict[str, float]) -> None:
        if "events" in self._warned:
            return
        try:
            # clu's writer needs TensorFlow, which takes 1.3 GB on disk.
            from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
            from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
            from tensorboard.summary.writer.record_writer import RecordWriter

            if self._events is None:
                name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
                self._events = (self._path.parent / name).open("wb")
                first = Event(wall_time=time.time(), file_version="brain.Event:2")
                RecordWriter(self._events).write(first.SerializeToString())
            scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            event = Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))
            RecordWriter(self._events).write(event.SerializeToString())
            self._events.flush()
        except Exception as error:  # an installed TensorFlow may be broken in any way
            self._warn("events", error)

    def _warn(self, what: str, error: Exception) -> None:
        if what not in self._warned:
            self._warned.add(what)
            rest = "TensorBoard events are off" if what == "events" else f"measurements are missing in {what}"
            console.say(f"warning: {rest} ({type(error).__name__}: {error}). Training continues.")


def _stays(point: Mapping[str, Any], step: int, evaluated: bool) -> bool:
    """Return whether a line belongs to the history of a run that resumes after `step`."""
    if point["step"] != step or evaluated:
        return point["step"] <= step
    return not any(name.startswith("heldout/") for name in point)
