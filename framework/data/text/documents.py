"""Where the documents of a text data set come from: the vendored sample, local files, or a prepared tfds set.

Each source streams the documents of a split as `str`, in a fixed order, never holding the whole set, and carries a
fingerprint that changes when its content may have. The sample and local files have no splits of their own: there
every tenth document (index % 10 == 9) is held out, by whole documents, so that no held-out text is ever trained on.
A malformed document keeps its index, so that mending it moves no other into another split.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator
from typing import Protocol, TypeVar

from etils import epath

from ...base.errors import UserError
from ...dataset import Split
from .. import samples
from ..preparing import streams
from ..reading import files, tsv
from ..reading.prepared import PreparedSet
from ..reading.records import Malformed

T = TypeVar("T")
HELD_OUT_EVERY = 10
SAMPLES = {"enwiki": "enwiki-106.txt.xz"}
_TSV = re.compile(r".*\.tsv(\.xz|\.gz)?", re.DOTALL)
_LONGEST_DOCUMENT = 1 << 30  # bytes; what is no text has no form feeds either, and must not be read into memory whole
_END = re.compile(rb"\r?\n?\f\Z")  # the form feed and the one newline before it belong to no document


class Documents(streams.Source, Protocol):
    """The documents of one source. `fingerprint` is a short text that changes with the content."""

    @property
    def fingerprint(self) -> str:
        """Text that differs whenever the documents may differ."""
        ...

    def stream(self, split: Split, start: int = 0, stop: int | None = None) -> Iterator[str | Malformed]:
        """Non-empty documents of a split, in a fixed order, malformed ones among them."""
        ...


def open_documents(
    source: str,
    *,
    data_dir: str = "",
    text_key: str = "text",
    tsv_column: int = 1,
    train_split: str = "",
    heldout_split: str = "",
) -> Documents:
    """The documents named by `source`: "sample:NAME", "file:GLOB" or "tfds:NAME[/CONFIG]:VERSION".

    Reads no more than is needed to know that the source is there and readable; writes nothing.

    Raises:
      UserError: the source cannot be read; the message has the path and the fix.
    """
    kind, _, name = source.partition(":")
    if kind == "sample":
        return SampleDocuments(name)
    if kind == "file":
        return FileDocuments(name, tsv_column)
    if kind == "tfds":
        return TfdsDocuments(name, data_dir, text_key, train_split, heldout_split)
    raise UserError(f"data.source {source!r} is none of 'sample:NAME', 'file:GLOB', 'tfds:NAME[/CONFIG]:VERSION'")


def held_out_by_index(documents: Iterator[T], split: Split) -> Iterator[T]:
    """Of what has no splits of its own those of a split: every tenth is held out."""
    return (
        document
        for index, document in enumerate(documents)
        if (index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == (split == "heldout")
    )


class SampleDocuments:
    """A sample that ships inside the package; one of `samples`."""

    def __init__(self, name: str):
        if name not in SAMPLES:
            raise UserError(f"data.source 'sample:{name}' is not shipped; there is sample:{', sample:'.join(SAMPLES)}")
        self._file = SAMPLES[name]
        self.fingerprint = samples.sha256(self._file)

    def count(self, split: Split) -> None:
        """See `streams.Source.count`."""

    def passed(self) -> float:
        """See `streams.Source.passed`; a sample takes seconds."""
        return 0.0

    def stream(self, split: Split, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """See `Documents.stream`."""
        content = samples.read(self._file).decode()
        documents = held_out_by_index(filter(None, re.split("\r?\n?\f", content)), split)
        return itertools.islice(documents, start, stop)


class FileDocuments:
    """UTF-8 files matching a glob, in the order of their paths, decompressed where they end in .xz or .gz.

    One document a file, or several by form feed; of a .tsv file one a row, its field in column `tsv_column`, from 1.
    """

    def __init__(self, pattern: str, tsv_column: int):
        self._tsv_column = tsv_column
        self._paths = files.matching(pattern, "*.txt")
        self._meter = files.Meter(self._paths)
        found = len(list(itertools.islice(self._documents(), HELD_OUT_EVERY)))
        if found < HELD_OUT_EVERY:
            raise UserError(
                f"data.source 'file:{pattern}' has {found} documents and needs at least {HELD_OUT_EVERY}, because "
                f"every {HELD_OUT_EVERY}th is held out; give more files or separate documents by a form feed"
            )
        column = tsv_column if any(map(_is_tsv, self._paths)) else None
        self.fingerprint = hashlib.sha256(repr((files.stats(self._paths), column)).encode()).hexdigest()

    def count(self, split: Split) -> None:
        """See `streams.Source.count`."""

    def passed(self) -> float:
        """See `streams.Source.passed`."""
        return self._meter.share()

    def stream(self, split: Split, start: int = 0, stop: int | None = None) -> Iterator[str | Malformed]:
        """See `Documents.stream`."""
        return itertools.islice(held_out_by_index(self._documents(), split), start, stop)

    def _documents(self) -> Iterator[str | Malformed]:
        for path in self._paths:
            yield from filter(None, self._fields(path) if _is_tsv(path) else _texts(path, self._meter))

    def _fields(self, path: epath.Path) -> Iterator[str | Malformed]:
        for row in tsv.read(path, meter=self._meter):
            if isinstance(row, Malformed):
                yield row
            elif self._tsv_column > len(row):
                raise UserError(f"data.tsv_column is {self._tsv_column}, but {path} has {len(row)} columns")
            else:
                yield row[self._tsv_column - 1]


def _is_tsv(path: epath.Path) -> bool:
    return _TSV.fullmatch(path.name) is not None


def _texts(path: epath.Path, meter: files.Meter) -> Iterator[str | Malformed]:
    """The documents of a text file; the form feed between two, and one newline before it, belong to neither."""
    for number, content in enumerate(files.records(path, b"\f", _LONGEST_DOCUMENT, meter), start=1):
        place = f"{path}, document {number}"
        if content is None:
            yield Malformed(place, f"more than {_LONGEST_DOCUMENT:,} bytes")
            continue
        try:
            yield _END.sub(b"", content).decode("utf-8")
        except UnicodeDecodeError as error:
            yield Malformed(place, f"not UTF-8 at byte {error.start}")


class TfdsDocuments:
    """One feature of a `prepared.PreparedSet`."""

    def __init__(self, name: str, data_dir: str, text_key: str, train_split: str, heldout_split: str):
        self._set = PreparedSet(name, data_dir, {"text_key": text_key}, train=train_split, heldout=heldout_split)
        self._text_key = text_key
        self.fingerprint = self._set.fingerprint

    def count(self, split: Split) -> int:
        """See `streams.Source.count`."""
        return self._set.count(split)

    def passed(self) -> float:
        """See `streams.Source.passed`; of no use here."""
        return 0.0

    def stream(self, split: Split, start: int = 0, stop: int | None = None) -> Iterator[str | Malformed]:
        """See `Documents.stream`."""
        for place, example in self._set.stream(split, start, stop):
            if isinstance(example, Malformed):
                yield example
                continue
            try:
                text = example[self._text_key].decode("utf-8")
            except UnicodeDecodeError as error:
                yield Malformed(place, f"not UTF-8 at byte {error.start}")
                continue
            if text:
                yield text
