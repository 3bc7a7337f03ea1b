"""The work of preparing: a share of the shards of a data set, made one after the other wherever the work is put."""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from etils import epath

from ...base import paths
from ..reading import shards
from ..reading.records import Rejects
from . import manifests
from .streams import Stream

ROWS = ".array_record"
_TICK_SECONDS = 0.5

Report = Callable[[str, Any], None]


@dataclasses.dataclass(frozen=True)
class Ingredients:
    """What all shards of a preparation are made with; picklable.

    Attributes:
      tokenizer: path of its JSON, "" for data that have none.
      sha256: hash of that file.
      known: held-out sources that are trained on.
    """

    tokenizer: str = ""
    sha256: str = ""
    known: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Share:
    """Of every `of` shards number `index`: those of one worker of one process."""

    index: int
    of: int

    def has(self, stream: int, number: int, together: bool) -> bool:
        """Whether shard `number` of a stream is among them."""
        return (stream if together else stream + number) % self.of == self.index


class Tally:
    """What is counted while a shard is made: `counts` by noun, `dropped` by reason, and malformed records."""

    def __init__(self, limit: int):
        self.counts, self.dropped = collections.Counter[str](), collections.Counter[str]()
        self.rejects = Rejects(limit)


class Recipe(Protocol):
    """What a worker asks of a data set; see `preparing.Preparable`."""

    @property
    def max_malformed(self) -> int:
        """Records of a split that may be skipped."""
        ...

    def open_source(self) -> Any:
        """The source."""
        ...

    def streams(self, source: Any) -> Sequence[Stream]:
        """Its records in blocks."""
        ...

    def tools(self, ingredients: Ingredients) -> Any:
        """What `rows` needs."""
        ...

    def rows(self, stream: Stream, number: int, records: Iterator[Any], tools: Any, tally: Tally) -> Iterator[bytes]:
        """The rows of a shard."""
        ...


@dataclasses.dataclass(frozen=True)
class Job:
    """What workers are given; picklable."""

    data: Recipe
    folder: epath.Path
    ingredients: Ingredients

    def work(self, share: Share, report: Report) -> None:
        """Make the missing shards of a share.

        Args:
          share: which.
          report: called with ("tick", (share of the work done, records, rows)) about twice a second, and with
            ("shard", what is noted of it) after each shard.
        """
        source, tools = self.data.open_source(), self.data.tools(self.ingredients)
        streams = self.data.streams(source)
        meter = _Meter(streams, report)
        there = names(self.folder)
        for index, stream in enumerate(streams):
            if stream.together and not share.has(index, 0, True):
                meter.next_stream()
                continue
            count = 0
            for number, records in enumerate(stream.blocks()):
                count = number + 1
                meter.tick()
                name = f"{stream.name}-{number:05}"
                if share.has(index, number, stream.together) and not {f"{name}.json", f"{name}{ROWS}"} <= there:
                    report("shard", self._make(stream, number, name, records, tools, meter))
            paths.write_text(self.folder / f"{stream.name}.json", manifests.to_text({"shards": count}))
            meter.next_stream()

    def _make(
        self, stream: Stream, number: int, name: str, records: Iterator[Any], tools: Any, meter: "_Meter"
    ) -> dict[str, Any]:
        tally = Tally(self.data.max_malformed)
        usable = tally.rejects.sift(meter.counted(records))
        rows = meter.counted_rows(self.data.rows(stream, number, usable, tools, tally))
        written = shards.write(self.folder / f"{name}{ROWS}", rows)
        note = {
            "file": f"{name}{ROWS}",
            "split": stream.split,
            **written._asdict(),
            "tokenizer": self.ingredients.sha256,
            "counts": dict(tally.counts),
            "dropped": dict(tally.dropped),
            "malformed": tally.rejects.to_json(),
        }
        paths.write_text(self.folder / f"{name}.json", manifests.to_text(note))
        return note


def names(folder: epath.Path) -> set[str]:
    """The names of what a folder holds; none where there is no folder."""
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


class _Meter:
    """How far a worker is, told about twice a second."""

    def __init__(self, streams: Sequence[Stream], report: Report):
        self._streams, self._report = streams, report
        self._stream = self._records = self._rows = 0
        self._told = 0.0

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._told >= _TICK_SECONDS:
            self._told = now
            self._report("tick", (self._share(), self._records, self._rows))

    def next_stream(self) -> None:
        self._stream += 1
        self._told = 0.0
        self.tick()

    def counted(self, records: Iterator[Any]) -> Iterator[Any]:
        for record in records:
            self._records += 1
            self.tick()
            yield record

    def counted_rows(self, rows: Iterator[bytes]) -> Iterator[bytes]:
        for row in rows:
            self._rows += 1
            yield row

    def _share(self) -> float:
        weights = [stream.weight for stream in self._streams]
        passed = sum(weights[: self._stream])
        if self._stream < len(weights):
            passed += weights[self._stream] * self._streams[self._stream].passed()
        return passed / sum(weights)
