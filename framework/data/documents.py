"""Where the documents of a text data set come from: the vendored sample, local files, or a prepared tfds set.

Each source streams the documents of a split as `str`, in a fixed order, never holding the whole set, and carries a
fingerprint that changes when its content may have. The sample and local files have no splits of their own: there
every tenth document (index % 10 == 9) is held out, by whole documents, so that no held-out text is ever trained on.
A malformed document keeps its index, so that mending it moves no other into another split.
"""

import glob
import hashlib
import itertools
import lzma
import os
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from ..errors import UserError
from . import files, samples, tsv
from .records import Malformed

T = TypeVar("T")
Split = Literal["train", "heldout"]
HELD_OUT_EVERY = 10
SAMPLES = {"enwiki": "enwiki-106.txt.xz"}
_TSV = re.compile(r".*\.tsv(\.xz|\.gz)?", re.DOTALL)
_LONGEST_DOCUMENT = 1 << 30  # bytes; what is no text has no form feeds either, and must not be read into memory whole
_SHOWN = 80  # characters of another library's message
_END = re.compile(rb"\r?\n?\f\Z")  # the form feed and the one newline before it belong to no document


class Documents(Protocol):
    """The documents of one source. `fingerprint` is a short text that changes with the content."""

    @property
    def fingerprint(self) -> str:
        """Text that differs whenever the documents may differ."""
        ...

    def stream(self, split: Split) -> Iterator[str | Malformed]:
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


def _held_out_by_index(documents: Iterator[T], split: Split) -> Iterator[T]:
    return (
        document
        for index, document in enumerate(documents)
        if (index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == (split == "heldout")
    )


class SampleDocuments:
    """A sample that ships inside the package; its bytes are checked against LICENSES.md when they are read."""

    def __init__(self, name: str):
        if name not in SAMPLES:
            raise UserError(f"data.source 'sample:{name}' is not shipped; there is sample:{', sample:'.join(SAMPLES)}")
        self._file = SAMPLES[name]
        notice = resources.files(samples).joinpath("LICENSES.md").read_text()
        row = next(line for line in notice.splitlines() if f"`{self._file}`" in line)
        self.fingerprint = re.findall(r"\b[0-9a-f]{64}\b", row)[0]

    def stream(self, split: Split) -> Iterator[str]:
        """See `Documents.stream`."""
        content = lzma.decompress(resources.files(samples).joinpath(self._file).read_bytes())
        digest = hashlib.sha256(content).hexdigest()
        if digest != self.fingerprint:
            raise UserError(
                f"{self._file} has sha256 {digest}, LICENSES.md says {self.fingerprint}; install shampax again"
            )
        return _held_out_by_index(filter(None, re.split("\r?\n?\f", content.decode())), split)


class FileDocuments:
    """UTF-8 files matching a glob, in the order of their paths, decompressed where they end in .xz or .gz.

    One document a file, or several by form feed; of a .tsv file one a row, its field in column `tsv_column`, from 1.
    """

    def __init__(self, pattern: str, tsv_column: int):
        self._tsv_column = tsv_column
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
        self._paths = [Path(match) for match in sorted(matches) if os.path.isfile(match)]
        if not self._paths:
            hint = f"; for the files in a directory write file:{pattern.rstrip('/')}/*.txt" if matches else ""
            raise UserError(f"data.source 'file:{pattern}' matches no file{hint or '; check the path'}")
        for path in self._paths:
            if not os.access(path, os.R_OK):
                raise UserError(f"data file {path} cannot be read; check its permissions (chmod +r)")
        found = len(list(itertools.islice(self._documents(), HELD_OUT_EVERY)))
        if found < HELD_OUT_EVERY:
            raise UserError(
                f"data.source 'file:{pattern}' has {found} documents and needs at least {HELD_OUT_EVERY}, because "
                f"every {HELD_OUT_EVERY}th is held out; give more files or separate documents by a form feed"
            )
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self._paths]
        column = tsv_column if any(map(_is_tsv, self._paths)) else None
        self.fingerprint = hashlib.sha256(repr((stats, column)).encode()).hexdigest()

    def stream(self, split: Split) -> Iterator[str | Malformed]:
        """See `Documents.stream`."""
        return _held_out_by_index(self._documents(), split)

    def _documents(self) -> Iterator[str | Malformed]:
        for path in self._paths:
            yield from filter(None, self._fields(path) if _is_tsv(path) else _texts(path))

    def _fields(self, path: Path) -> Iterator[str | Malformed]:
        for row in tsv.read(path):
            if isinstance(row, Malformed):
                yield row
            elif self._tsv_column > len(row):
                raise UserError(f"data.tsv_column is {self._tsv_column}, but {path} has {len(row)} columns")
            else:
                yield row[self._tsv_column - 1]


def _is_tsv(path: Path) -> bool:
    return _TSV.fullmatch(path.name) is not None


def _texts(path: Path) -> Iterator[str | Malformed]:
    """The documents of a text file; the form feed between two, and one newline before it, belong to neither."""
    for number, content in enumerate(files.records(path, b"\f", _LONGEST_DOCUMENT), start=1):
        place = f"{path}, document {number}"
        if content is None:
            yield Malformed(place, f"more than {_LONGEST_DOCUMENT:,} bytes")
            continue
        try:
            yield _END.sub(b"", content).decode("utf-8")
        except UnicodeDecodeError as error:
            yield Malformed(place, f"not UTF-8 at byte {error.start}")


class TfdsDocuments:
    """A prepared tensorflow-datasets set in array_record form, read without TensorFlow.

    It lies in `data_dir`/NAME[/CONFIG]/VERSION (local or gs://); an empty `data_dir` is $TFDS_DATA_DIR or tfds' own
    default, ~/tensorflow_datasets. Split names may be tfds slices such as "train[:90%]".
    """

    _READ_AHEAD = 256  # documents fetched at once

    def __init__(self, name: str, data_dir: str, text_key: str, train_split: str, heldout_split: str):
        import tensorflow_datasets as tfds  # 0.4 s, and only this source needs it

        dataset, _, version = name.partition(":")
        if not version:
            raise UserError(f"data.source 'tfds:{name}' has no version; write it in full, as in tfds:lm1b:1.1.0")
        root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        directory = f"{os.path.expanduser(root).rstrip('/')}/{dataset}/{version}"
        prepare = f"prepare it with: tfds build {dataset} --data_dir={root} --file_format=array_record"
        try:
            builder: Any = tfds.builder_from_directory(directory)
        except (OSError, tfds.core.DatasetNotFoundError) as error:
            raise UserError(
                f"data set tfds:{name} is not prepared in {directory}; set data.data_dir, or {prepare}"
            ) from error
        if text_key not in builder.info.features:
            features = ", ".join(sorted(builder.info.features))
            raise UserError(f"tfds:{name} has no feature {text_key!r}; set data.text_key to one of {features}")
        file_format = builder.info.file_format
        if file_format is None or file_format.file_suffix != "array_record":
            raise UserError(
                f"{directory} is in {file_format and file_format.file_suffix} form, which has no random access; "
                f"{prepare}"
            )
        self._splits = {"train": train_split, "heldout": heldout_split}
        taken = {}
        for knob, split in self._splits.items():
            try:
                parts = builder.info.splits[split].file_instructions
                ranges = [(part.filename, part.skip, part.skip + part.take) for part in parts]
            except (KeyError, ValueError) as error:
                known = ", ".join(sorted(builder.info.splits))
                raise UserError(
                    f"tfds:{name} has no split {split!r}; set data.{knob}_split to one of {known}"
                ) from error
            if not ranges:
                raise UserError(f"split {split!r} of tfds:{name} is empty; choose another data.{knob}_split")
            taken[knob] = ranges
            try:
                _fetch(builder.as_data_source(split=split), [0])
            except (OSError, RuntimeError, ValueError, IndexError) as error:
                raise UserError(f"split {split!r} in {directory} cannot be read ({error}); {prepare}") from None
        for (file, start, end), (other, other_start, other_end) in itertools.product(taken["train"], taken["heldout"]):
            if file == other and start < other_end and other_start < end:
                raise UserError(
                    f"data.train_split {train_split!r} and data.heldout_split {heldout_split!r} of tfds:{name} share "
                    f"examples of {file}; choose splits that do not overlap"
                )
        self._builder = builder
        self._name = name
        self._text_key = text_key
        self.fingerprint = hashlib.sha256(repr((directory, text_key, taken)).encode()).hexdigest()

    def stream(self, split: Split) -> Iterator[str | Malformed]:
        """See `Documents.stream`."""
        examples = self._builder.as_data_source(split=self._splits[split])
        for start in range(0, len(examples), self._READ_AHEAD):
            indices = range(start, min(start + self._READ_AHEAD, len(examples)))
            try:
                fetched = _fetch(examples, list(indices))
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"split {self._splits[split]!r} of tfds:{self._name} cannot be read any further ({error}); "
                    "check its files"
                ) from None
            for index, example in zip(indices, fetched, strict=True):
                place = f"tfds:{self._name} split {self._splits[split]!r}, row {index + 1}"
                if isinstance(example, RuntimeError):
                    yield Malformed(place, str(example)[:_SHOWN])
                    continue
                try:
                    text = example[self._text_key].decode("utf-8")
                except UnicodeDecodeError as error:
                    yield Malformed(place, f"not UTF-8 at byte {error.start}")
                    continue
                if text:
                    yield text


def _fetch(examples: Any, indices: list[int]) -> list[Any]:
    """Examples by number, a RuntimeError in place of each whose checksum does not hold; others are raised."""
    try:
        return examples.__getitems__(indices)
    except RuntimeError as error:
        if not str(error).startswith("Corrupted"):
            raise
        if len(indices) == 1:
            return [error]
        return [example for index in indices for example in _fetch(examples, [index])]
