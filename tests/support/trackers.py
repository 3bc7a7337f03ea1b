"""A tracker that fails in several ways, and readers of what trackers have stored."""

import dataclasses
import json
import os
import struct
import time
from pathlib import Path

from shampax.framework.reporting.trackers.tracker import TrackedRun


@dataclasses.dataclass(frozen=True)
class Recorder:
    """Append each call to a file, as a line of JSON; fail at the call `fails_at`, in the way that `how` names."""

    path: str
    fails_at: str = ""
    how: str = "raises"

    def open(self, run: TrackedRun):
        self.note("open", run.id, run.name)
        return self

    def scalars(self, step, values):
        self.note("scalars", step, values)

    def texts(self, step, texts):
        self.note("texts", step, texts)

    def close(self, complete):
        self.note("close", complete)

    def note(self, call, *arguments):
        with Path(self.path).open("a") as file:
            file.write(json.dumps([call, *arguments]) + "\n")
        if call != self.fails_at:
            return
        if self.how == "hangs":
            time.sleep(1000)
        if self.how == "dies":
            os._exit(9)
        if self.how == "ends":
            raise SystemExit(0)
        raise OSError(28, "No space left on device")


def recorded(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wandb_records(path):
    """Return the records of a file of wandb: a log of LevelDB behind 7 bytes, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def wandb_points(path):
    """Return the id of the run, and for each measurement [step, values]."""
    points, ids = [], set()
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            values = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
            }
            points.append((record.history.step.num, values))
        elif record.WhichOneof("record_type") == "run":
            ids.add((record.run.run_id, record.run.project))
    (found,) = ids
    return found, points
