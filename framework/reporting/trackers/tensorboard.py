"""TensorBoard: events in the workdir."""

import dataclasses
import io
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ...base import paths
from ...base.parts import Parts
from .tracker import TrackedRun


@dataclasses.dataclass(frozen=True)
class TensorBoard:
    """Write events for TensorBoard into the workdir, a file for each process of the run."""

    def open(self, run: TrackedRun) -> "_Events":
        """Begin a file."""
        return _Events(paths.of(run.workdir))


class _Events:
    def __init__(self, folder: paths.Path):
        # clu's writer needs TensorFlow, which takes 1.3 GB on disk.
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._records = Event, Summary, RecordWriter
        path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        head = self._encoded(file_version="brain.Event:2")
        self._parts = None if paths.is_local(folder) else Parts(path, head)
        self._file: Any = None
        if self._parts is None:
            self._file = path.open("wb")
            self._file.write(head)
            self._file.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, [self._summary.Value(tag=name, simple_value=number) for name, number in values.items()])

    def texts(self, step: int, texts: Sequence[Mapping[str, str]]) -> None:
        """Write values for TensorBoard's text plugin."""
        values = [
            self._summary.Value(
                tag=f"samples/{number}",
                metadata={"plugin_data": {"plugin_name": "text"}},
                tensor={"dtype": "DT_STRING", "string_val": [f"**{each['prompt']}**{each['text']}".encode()]},
            )
            for number, each in enumerate(texts)
        ]
        self._add(step, values)

    def close(self, complete: bool) -> None:
        if self._parts:
            self._parts.flush()
        else:
            self._file.close()

    def _add(self, step: int, values: list[Any]) -> None:
        event = self._encoded(step=step, summary=self._summary(value=values))
        if self._parts:
            self._parts.append(event)
        else:
            self._file.write(event)
            self._file.flush()

    def _encoded(self, **fields: Any) -> bytes:
        file = io.BytesIO()
        self._records(file).write(self._event(wall_time=time.time(), **fields).SerializeToString())
        return file.getvalue()
