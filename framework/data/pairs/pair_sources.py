"""Where sentence pairs come from: the vendored sample, local TSV files, or a prepared tfds set.

Each source streams the pairs of a split in a fixed order, never holding the whole set, and carries a fingerprint that
changes when its content may have.
"""

import hashlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from etils import epath

from ...base.errors import UserError
from ...dataset import Split
from .. import samples
from ..preparing import streams
from ..reading import files, tsv
from ..reading.prepared import PreparedSet
from ..reading.records import Malformed
from ..text.documents import HELD_OUT_EVERY, held_out_by_index

SAMPLES = {"nt": "web-lsg-nt.en-fr.tsv.xz"}
SAMPLE_SPLITS = {"validation": 0, "test": 1}  # (7 * book + chapter) % 20; other chapters are trained on


class Pair(NamedTuple):
    """A sentence and its translation; either may be empty."""

    source: str
    target: str


class Pairs(streams.Source, Protocol):
    """The pairs of one source.

    Attributes:
      fingerprint: a short text that changes with the content.
      official: whether its splits are those that others report results on, which nothing is to be left out of.
    """

    fingerprint: str
    official: bool

    def stream(self, split: Split, start: int = 0, stop: int | None = None) -> Iterator[Pair | Malformed]:
        """Pairs of a split, in a fixed order, malformed ones among them."""
        ...


def open_pairs(
    source: str,
    *,
    data_dir: str,
    source_key: str,
    target_key: str,
    source_column: int,
    target_column: int,
    train_split: str,
    heldout_split: str,
) -> Pairs:
    """The pairs named by `source`: "sample:NAME", "file:GLOB" or "tfds:NAME/CONFIG:VERSION".

    Reads no more than is needed to know that the source is there and readable; writes nothing.

    Raises:
      UserError: the source cannot be read; the message has the path and the fix.
    """
    kind, _, name = source.partition(":")
    if kind == "sample":
        return SamplePairs(name, heldout_split)
    if kind == "file":
        return FilePairs(name, source_column, target_column)
    if kind == "tfds":
        return TfdsPairs(name, data_dir, source_key, target_key, train_split, heldout_split)
    raise UserError(f"data.source {source!r} is none of 'sample:NAME', 'file:GLOB', 'tfds:NAME/CONFIG:VERSION'")


class SamplePairs:
    """Verses of the New Testament, English to French, split by chapter; one of `SAMPLES`."""

    official = False

    def __init__(self, name: str, heldout_split: str):
        if name not in SAMPLES:
            raise UserError(f"data.source 'sample:{name}' is not shipped; there is sample:{', sample:'.join(SAMPLES)}")
        if heldout_split not in SAMPLE_SPLITS:
            raise UserError(
                f"data.heldout_split is {heldout_split!r}; sample:{name} has {' and '.join(SAMPLE_SPLITS)} to hold out"
            )
        self._file, self._heldout = SAMPLES[name], SAMPLE_SPLITS[heldout_split]
        self.fingerprint = f"{samples.sha256(self._file)} {heldout_split}"

    def count(self, split: Split) -> None:
        """See `streams.Source.count`."""

    def passed(self) -> float:
        """See `streams.Source.passed`; a sample takes seconds."""
        return 0.0

    def stream(self, split: Split, start: int = 0, stop: int | None = None) -> Iterator[Pair]:
        """See `Pairs.stream`."""
        return itertools.islice(self._pairs(split), start, stop)

    def _pairs(self, split: Split) -> Iterator[Pair]:
        for line in samples.read(self._file).decode().removesuffix("\n").split("\n"):
            place, source, target = line.split("\t")
            book, chapter, _ = map(int, place.split("."))
            group = (7 * book + chapter) % 20
            if group == self._heldout if split == "heldout" else group not in SAMPLE_SPLITS.values():
                yield Pair(source, target)


class FilePairs:
    """Two columns of TSV files matching a glob, in the order of their paths; every tenth row is held out."""

    official = False

    def __init__(self, pattern: str, source_column: int, target_column: int):
        self._columns = {"source": source_column, "target": target_column}
        self._paths = files.matching(pattern, "*.tsv")
        self._meter = files.Meter(self._paths)
        found = len(list(itertools.islice(self._rows(), HELD_OUT_EVERY)))
        if found < HELD_OUT_EVERY:
            raise UserError(
                f"data.source 'file:{pattern}' has {found} rows and needs at least {HELD_OUT_EVERY}, because every "
                f"{HELD_OUT_EVERY}th is held out; give more"
            )
        content = repr((files.stats(self._paths), self._columns))
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def count(self, split: Split) -> None:
        """See `streams.Source.count`."""

    def passed(self) -> float:
        """See `streams.Source.passed`."""
        return self._meter.share()

    def stream(self, split: Split, start: int = 0, stop: int | None = None) -> Iterator[Pair | Malformed]:
        """See `Pairs.stream`."""
        return itertools.islice(held_out_by_index(self._rows(), split), start, stop)

    def _rows(self) -> Iterator[Pair | Malformed]:
        for path in self._paths:
            for row in tsv.read(path, meter=self._meter):
                yield row if isinstance(row, Malformed) else self._pair(path, row)

    def _pair(self, path: epath.Path, row: tuple[str, ...]) -> Pair:
        for side, column in self._columns.items():
            if column > len(row):
                raise UserError(
                    f"data.{side}_column is {column}, but {path} has {len(row)} columns; columns are separated by tabs "
                    "and count from 1"
                )
        return Pair(*(row[column - 1] for column in self._columns.values()))


class TfdsPairs:
    """Two features of a `prepared.PreparedSet`, read by their names, whatever the set's supervised keys are."""

    official = True

    def __init__(
        self, name: str, data_dir: str, source_key: str, target_key: str, train_split: str, heldout_split: str
    ):
        self._keys = {"source_key": source_key, "target_key": target_key}
        self._set = PreparedSet(name, data_dir, self._keys, train=train_split, heldout=heldout_split)
        # The set's own fingerprint takes no notice of which feature is which.
        self.fingerprint = f"{self._set.fingerprint} {source_key} {target_key}"

    def count(self, split: Split) -> int:
        """See `streams.Source.count`."""
        return self._set.count(split)

    def passed(self) -> float:
        """See `streams.Source.passed`; of no use here."""
        return 0.0

    def stream(self, split: Split, start: int = 0, stop: int | None = None) -> Iterator[Pair | Malformed]:
        """See `Pairs.stream`."""
        for place, example in self._set.stream(split, start, stop):
            if isinstance(example, Malformed):
                yield example
                continue
            try:
                pair = Pair(*(example[key].decode("utf-8") for key in self._keys.values()))
            except UnicodeDecodeError as error:
                yield Malformed(place, f"not UTF-8 at byte {error.start}")
                continue
            yield pair
