"""TensorBoard: events in the workdir."""

import dataclasses
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .tracker import TrackedRun


@dataclasses.dataclass(frozen=True)
class TensorBoard:
    """Write events for TensorBoard into the workdir, a file for each process of the run."""

    def open(self, run: TrackedRun) -> "_Events":
        """Begin a file."""
        return _Events(Path(run.workdir))


class _Events:
    def __init__(self, folder: Path):
        # clu's writer needs TensorFlow, which takes 1.3 GB on disk.
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        self._file = (folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}").open("wb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")

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
        self._file.close()

    def _add(self, step: int, values: list[Any]) -> None:
        self._write(step=step, summary=self._summary(value=values))

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()
