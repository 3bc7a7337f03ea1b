"""Write measurements and samples to the workdir as JSON lines, and give them to the trackers.

In a bucket these files consist of parts. If the disk or a tracker fails, the run warns and continues without it.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..base import paths
from ..base import workdir as layout
from ..base.json_files import is_number, parse_object
from ..base.parts import Parts, keep
from ..base.paths import Path
from ..distributed import console
from .runs import parse_point
from .trackers.relay import Relay


class MetricsWriter:
    """Write lines of `metrics.jsonl` and `samples.jsonl`, and send what is reported to trackers.

    One process of a run writes. When a run resumes, lines after its checkpoint are dropped, so that its history equals
    that of an uninterrupted run.
    """

    def __init__(self, workdir: Path, trackers: Sequence[Relay] = (), *, after_step: int, evaluated: bool):
        """Drop the lines after `after_step`, its samples and, unless `evaluated`, its evaluation: they are repeated."""
        self._path, self._samples, self._layers = (workdir / x for x in (layout.METRICS, layout.SAMPLES, layout.LAYERS))
        self._layer_names: Sequence[str] = ()
        self._trackers = trackers
        self._local = paths.is_local(workdir)
        self._parts: dict[str, Parts] = {}  # in a bucket, by the name of the file
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="parts")
        self._warned: set[str] = set()  # the files that could not be written
        self._lines: list[str] = []  # of metrics.jsonl, not yet written
        self._keep(self._path, lambda line: _stays(parse_point(line), after_step, evaluated))
        self._keep(self._samples, lambda line: _step(line) < after_step)
        self._keep(self._layers, lambda line: _step(line) <= after_step)

    def write(
        self, *, step: int, seconds: float, tokens: int, values: Mapping[str, float], reported: bool = True
    ) -> None:
        """Append the measurements after `step`. A number that is not finite becomes null.

        What is not `reported` is kept until `flush` or the next report, and trackers do not get it.
        """
        line = {"step": step, "seconds": round(seconds, 3), "tokens": tokens} | {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }
        self._lines.append(json.dumps(line))
        if reported:
            self.flush()
            self._send(step=step, values=dict(values))

    def flush(self) -> None:
        """Write the lines that are kept."""
        lines, self._lines = self._lines, []
        self._append(self._path, lines)

    def samples(self, *, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append the continuations of prompts after `step`, objects with "prompt" and "text"."""
        self._append(self._samples, [json.dumps({"step": step, **each}) for each in samples])
        self._send(step=step, texts=list(samples))

    def _send(self, **message: Any) -> None:
        for tracker in self._trackers:
            tracker.send(**message)

    def layers(self, step: int, names: Sequence[str], values: Mapping[str, Any]) -> None:
        """Append measurements of each layer after `step`: metric -> [layers], as null where a number is not finite."""
        if not names:
            return
        line: dict[str, Any] = {"step": step}
        if names != self._layer_names:  # the first time
            self._layer_names = line["names"] = names
        for name, each in values.items():
            line[name] = [float(f"{value:.4g}") if math.isfinite(value) else None for value in each]
        self._append(self._layers, [json.dumps(line)])

    def settle(self) -> None:
        """Wait until what was written before is in the bucket."""
        if not self._local:
            self._thread.submit(self._write_parts).result()

    def _append(self, path: Path, lines: Sequence[str]) -> None:
        if not lines:
            return
        if not self._local:
            self._thread.submit(self._append_part, path, "".join(f"{line}\n" for line in lines).encode())
            return
        try:
            with path.open("a") as file:
                # A line that a full disk has cut short ends here, and readers skip it.
                file.write(("\n" if path.name in self._warned else "") + "".join(f"{line}\n" for line in lines))
        except OSError as error:
            self._warn(path.name, error)

    def _append_part(self, path: Path, content: bytes) -> None:
        try:
            if path.name not in self._parts:
                self._parts[path.name] = Parts(path)
            self._parts[path.name].append(content)
        except paths.errors() as error:  # kept, and written with what follows
            self._warn(path.name, error)

    def _write_parts(self) -> None:
        for name, each in self._parts.items():
            try:
                each.flush()
            except paths.errors() as error:
                self._warn(name, error)

    def _keep(self, path: Path, stays: Callable[[str], bool]) -> None:
        """Drop the other lines of a file."""
        try:
            keep(path, stays)
        except paths.errors() as error:
            self._warn(path.name, error)

    def close(self, *, complete: bool) -> None:
        """Write what is kept, and let the trackers finish; `complete` tells whether the run has taken all its steps."""
        self.flush()
        self.settle()
        self._thread.shutdown()
        for tracker in self._trackers:
            tracker.close(complete)

    def _warn(self, what: str, error: Exception) -> None:
        if what not in self._warned:
            self._warned.add(what)
            told = f"measurements are missing in {what} ({type(error).__name__}: {error})"
            console.say(f"warning: {told}. Training continues.")


def _step(line: str) -> float:
    """Return the step of a line, infinity if it has none."""
    step = (parse_object(line) or {}).get("step")
    return float(step) if step is not None and is_number(step) else math.inf


def _stays(point: Mapping[str, Any] | None, step: int, evaluated: bool) -> bool:
    """Return whether a line belongs to the history of a run that resumes after `step`."""
    if point is None:
        return False
    if point["step"] != step or evaluated:
        return point["step"] <= step
    return not any(name.startswith("heldout/") for name in point)
