"""The documents of text data sets: the knobs that choose them, and their sources."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

from etils import epath

from ...base.errors import UserError
from ...dataset import Split
from .. import samples
from ..reading import files, tsv
from ..reading.malformed import Malformed
from ..reading.sources import Source, TfdsSource, every_tenth, file_source
from .tokenized import Tokenized

SAMPLES = {"enwiki": "enwiki-106.txt.xz"}
_TSV = re.compile(r".*\.tsv(\.xz|\.gz)?", re.DOTALL)
_LONGEST_DOCUMENT = 1 << 30  # bytes; longer ones are malformed and not held in memory
_END = re.compile(rb"\r?\n?\f\Z")  # the form feed and the one newline before it belong to no document


@dataclasses.dataclass(frozen=True)
class DocumentData(Tokenized):
    """Base of data sets made of documents from the vendored sample, local files or a prepared tfds set."""

    noun: ClassVar[str] = "documents"

    source: str = "sample:enwiki"  # or "tfds:lm1b:1.1.0", "tfds:c4/en:3.1.0", "file:/path/*.txt", "file:/path/*.tsv.xz"
    data_dir: str = ""  # folder of tfds sets, local or gs://; "" uses $TFDS_DATA_DIR or ~/tensorflow_datasets
    text_key: str = "text"  # feature of a tfds set that holds the document
    tsv_column: int = 1  # column of a .tsv file that holds the document; the first is 1
    train_split: str = "train"  # tfds split to train on
    heldout_split: str = "validation"  # tfds split to evaluate on ("test" for lm1b); samples and files use every 10th
    max_documents: int = 0  # per split, malformed ones included, also for training the tokenizer; 0 takes all

    def __post_init__(self):
        super().__post_init__()
        if self.source.partition(":")[0] not in ("sample", "file", "tfds"):
            raise ValueError(
                f"data.source={self.source!r}: write 'sample:enwiki', 'file:/path/*.txt' or 'tfds:lm1b:1.1.0'"
            )
        if self.max_documents < 0:
            raise ValueError(f"data.max_documents={self.max_documents}: give a count, or 0 for all")
        if self.tsv_column < 1:
            raise ValueError(f"data.tsv_column={self.tsv_column}: columns count from 1")

    def open_source(self) -> Source[str]:
        """See `Preparable.open_source`."""
        return open_documents(
            self.source, self.data_dir, self.text_key, self.tsv_column, self.train_split, self.heldout_split
        )

    def source_knobs(self) -> Sequence[str]:
        """Return the names of the knobs that choose the documents together with `source`."""
        kind = self.source.partition(":")[0]
        return {"tfds": ("text_key", "train_split", "heldout_split"), "file": ("tsv_column",)}.get(kind, ())


def open_documents(
    source: str,
    data_dir: str = "",
    text_key: str = "text",
    tsv_column: int = 1,
    train_split: str = "",
    heldout_split: str = "",
) -> Source[str]:
    """Open the non-empty documents of "sample:NAME", "file:GLOB" or "tfds:NAME[/CONFIG]:VERSION".

    Reads only enough to know that the source is readable; writes nothing.

    Raises:
      UserError: the source cannot be read; the message has the path and the fix.
    """
    kind, _, name = source.partition(":")
    if kind == "tfds":
        return TfdsSource(name, data_dir, {"text_key": text_key}, str, train=train_split, heldout=heldout_split)
    if kind == "file":
        return _files(name, tsv_column)
    if name not in SAMPLES:
        raise UserError(f"data.source={source!r}: is not shipped; there is sample:{', sample:'.join(SAMPLES)}")

    def records(split: Split) -> Iterator[str]:
        content = samples.read(SAMPLES[name]).decode()
        return every_tenth(filter(None, re.split("\r?\n?\f", content)), split)

    return Source(samples.sha256(SAMPLES[name]), records)


def _files(pattern: str, tsv_column: int) -> Source[str]:
    """Open UTF-8 files: one document a file or several separated by form feeds; of a .tsv file one a row."""

    def read(path: epath.Path, meter: files.ReadMeter) -> Iterator[str | Malformed]:
        return filter(None, _column(path, meter, tsv_column) if _TSV.fullmatch(path.name) else _texts(path, meter))

    has_tsv = any(_TSV.fullmatch(path.name) for path in files.find("data.source", pattern, "*.txt"))
    return file_source(pattern, "*.txt", read, tsv_column if has_tsv else None)


def _column(path: epath.Path, meter: files.ReadMeter, column: int) -> Iterator[str | Malformed]:
    for row in tsv.read(path, meter):
        if not isinstance(row, Malformed) and column > len(row):
            raise UserError(f"data.tsv_column={column}: but {path} has {len(row)} columns")
        yield row if isinstance(row, Malformed) else row[column - 1]


def _texts(path: epath.Path, meter: files.ReadMeter) -> Iterator[str | Malformed]:
    for number, content in enumerate(files.pieces(path, b"\f", _LONGEST_DOCUMENT, meter), start=1):
        place = f"{path}, document {number}"
        if content is None:
            yield Malformed(place, f"more than {_LONGEST_DOCUMENT:,} bytes")
            continue
        try:
            yield _END.sub(b"", content).decode("utf-8")
        except UnicodeDecodeError as error:
            yield Malformed(place, f"not UTF-8 at byte {error.start}")
