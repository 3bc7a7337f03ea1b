"""Texts of records in JSON, JSON lines, Parquet and Arrow files, by key; read as streams, also compressed files.

A key is the name of a field, or names joined by dots for a field inside others: "translation.en".
"""

import codecs
import contextlib
import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath, epy

from ...base.errors import UserError
from . import files, tsv
from .malformed import Malformed

with epy.lazy_imports():  # takes 0.5 s, and only Parquet and Arrow files need it
    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.ipc
    import pyarrow.parquet

_LONGEST = 1 << 30  # bytes; longer JSON lines are malformed and not held in memory
_ROWS = 256  # rows of a Parquet file held at once
_SHOWN = 5  # fields that a message names
_SPACE = re.compile(r"[ \t\n\r]*")

# The place of a record, and its values in the order of the keys, or as a str the reason why it is malformed.
Records = Iterator[tuple[str, list[Any] | str]]


def read(path: epath.Path, knobs: Mapping[str, str]) -> Iterator[list[str] | Malformed]:
    """Yield some texts of each record of a file; knobs of `data` give their keys.

    Raises:
      UserError: the file cannot be read, a Parquet or Arrow file lacks a key, or a JSON array is broken.
    """
    for place, values in FORMATS[files.suffix(path)](path, knobs):
        if isinstance(values, list):
            values = _texts(values, list(knobs.values()))
        yield Malformed(f"{path}, {place}", values) if isinstance(values, str) else values


def objects(path: epath.Path) -> Iterator[dict[str, Any] | Malformed]:
    """Yield the objects of a JSON or JSON lines file.

    Raises:
      UserError: the file cannot be read, or a JSON array is broken.
    """
    for place, values in FORMATS[files.suffix(path)](path, {}):
        yield Malformed(f"{path}, {place}", values) if isinstance(values, str) else values[0]


def columns(path: epath.Path, keys: Mapping[str, str], numbers: Mapping[str, int]) -> Iterator[list[str] | Malformed]:
    """Yield some texts of each row of a file: by `keys`, or by their columns if it is tab-separated text.

    Raises:
      UserError: see `read` and `tsv.read_columns`.
    """
    return read(path, keys) if files.suffix(path) in FORMATS else tsv.read_columns(path, numbers)


def _texts(values: list[Any], keys: list[str]) -> list[str] | str:
    texts = []
    for value, key in zip(values, keys, strict=True):
        if not isinstance(value, (str, bytes)):
            return f"{key!r} is {'null' if value is None else f'a {type(value).__name__}'} and not text"
        try:
            # A JSON string may hold half of a surrogate pair, which no UTF-8 has.
            texts.append((value.encode() if isinstance(value, str) else value).decode())
        except (UnicodeEncodeError, UnicodeDecodeError) as error:
            return f"{key!r} is not UTF-8 at {'character' if isinstance(value, str) else 'byte'} {error.start}"
    return texts


def _json_lines(path: epath.Path, knobs: Mapping[str, str]) -> Records:
    for number, line in enumerate(files.pieces(path, b"\n", _LONGEST), start=1):
        if line is None or not line.isspace():
            yield f"line {number}", _of_line(line, knobs)


def _of_line(line: bytes | None, knobs: Mapping[str, str]) -> list[Any] | str:
    if line is None:
        return f"more than {_LONGEST:,} bytes"
    try:
        record = json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return _values(record, knobs)


def _values(record: Any, knobs: Mapping[str, str]) -> list[Any] | str:
    if not isinstance(record, dict):
        return f"a {type(record).__name__} and not an object"
    if not knobs:
        return [record]
    values = []
    for knob, key in knobs.items():
        found: Any = record
        for part in [key] if key in record else key.split("."):
            if not isinstance(found, dict) or part not in found:
                return f"has no data.{knob}={key!r}, but {', '.join(map(repr, itertools.islice(record, _SHOWN)))}"
            found = found[part]
        values.append(found)
    return values


def _json(path: epath.Path, knobs: Mapping[str, str]) -> Records:
    """Read an array of objects, or JSON lines."""
    with contextlib.closing(files.chunks(path)) as chunks:
        is_array = next(filter(None, map(bytes.lstrip, chunks)), b"")[:1] == b"["
    if not is_array:
        yield from _json_lines(path, knobs)
        return
    text, number = _Text(path), 0
    text.take()
    more = text.next() != "]"
    while more:
        number += 1
        yield f"record {number}", _values(text.value(number), knobs)
        if more := text.next() == ",":
            text.take()
    if text.next() != "]" or text.take() or text.next():
        text.refuse(number + 1)


class _Text:
    """A JSON text, of which about a megabyte is held, more only while a record needs it."""

    def __init__(self, path: epath.Path):
        # Bytes that are not UTF-8 become halves of surrogate pairs, which `_texts` finds.
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._chunks = (decoder.decode(chunk) for chunk in files.chunks(path))
        self._path, self._held, self._place = path, "", 0
        self._scan = json.JSONDecoder().raw_decode

    def next(self) -> str:
        """Return the next character that is not white space, "" at the end of the file."""
        while self._skip_space() == len(self._held):
            if not self._more():
                return ""
        return self._held[self._place]

    def take(self) -> None:
        """Pass the character of `next`."""
        self.next()
        self._place += 1

    def value(self, number: int) -> Any:
        """Return the value of record `number`, which ends before the next character."""
        while True:
            with contextlib.suppress(ValueError, RecursionError):
                value, end = self._scan(self._held, self._skip_space())
                if end < len(self._held):  # else a number may have further digits
                    self._place = end
                    return value
            if not self._more():
                self.refuse(number)

    def refuse(self, number: int) -> None:
        """Raise UserError: the records after a broken one cannot be found."""
        raise UserError(
            f"data file {self._path}: is not a JSON array of objects from record {number} on. Repair it, or convert it "
            "to JSON lines, of which broken lines can be skipped."
        )

    def _skip_space(self) -> int:
        space = _SPACE.match(self._held, self._place)
        self._place = space.end() if space else self._place
        return self._place

    def _more(self) -> bool:
        """Hold at least twice as much, so that a long record is not scanned too often."""
        parts = [self._held[self._place :]]
        wanted = 2 * len(parts[0]) + 1
        for chunk in self._chunks:
            parts.append(chunk)
            if sum(map(len, parts)) >= wanted or wanted > _LONGEST:
                break
        self._held, self._place = "".join(parts), 0
        return len(parts) > 1


def _parquet(path: epath.Path, knobs: Mapping[str, str]) -> Records:
    with _opened(path) as file:
        # Without pre_buffer, pages are read as they are needed, not whole row groups.
        parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        columns = _columns(path, parquet.schema_arrow, knobs)
        yield from _rows(parquet.iter_batches(_ROWS, columns=list(knobs.values()), use_threads=False), columns)


def _arrow(path: epath.Path, knobs: Mapping[str, str]) -> Records:
    """Read the stream that `datasets` saves, or a file in Arrow's (Feather's) format."""
    with _opened(path) as file:
        magic = file.read(6)
        file.seek(0)
        reader: Any = pyarrow.ipc.open_file(file) if magic == b"ARROW1" else pyarrow.ipc.open_stream(file)
        columns = _columns(path, reader.schema, knobs)
        count = getattr(reader, "num_record_batches", None)
        yield from _rows(reader if count is None else map(reader.get_batch, range(count)), columns)


FORMATS = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".arrow": _arrow}


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[Any]:
    """Open a file for random access; a compressed one is first written to an unnamed file on the disk."""
    try:
        with path.open("rb") if path.suffix not in files.COMPRESSED else tempfile.TemporaryFile() as file:
            if path.suffix in files.COMPRESSED:
                for chunk in files.chunks(path):
                    file.write(chunk)
                file.seek(0)
            yield file
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"data file {path}: cannot be read ({error}). Replace or remove it.") from error


def _columns(path: epath.Path, schema: Any, knobs: Mapping[str, str]) -> list[list[str]]:
    """Return the names of the nested fields of each key.

    Raises:
      UserError: there is no such field, or it does not hold text.
    """
    columns = []
    for knob, key in knobs.items():
        names, of = [key] if key in schema.names else key.split("."), schema
        for name in names:
            known = [field.name for field in of] if isinstance(of, (pa.Schema, pa.StructType)) else []
            if name not in known:
                shown = ", ".join(map(repr, known[:_SHOWN]))
                raise UserError(f"data.{knob}={key!r}: {path} has no such column. Use one of {shown}.")
            of = of.field(name) if isinstance(of, pa.Schema) else of[known.index(name)]
            of = of.type
        kind = of.value_type if pa.types.is_dictionary(of) else of
        if not any(is_text(kind) for is_text in _text_types()):
            raise UserError(f"data.{knob}={key!r}: the column of {path} holds {kind} and not text. Use another.")
        columns.append(names)
    return columns


def _text_types() -> list[Any]:
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return [getattr(pa.types, f"is_{name}") for name in names]


def _rows(batches: Any, columns: list[list[str]]) -> Records:
    number = itertools.count(1)
    for batch in batches:
        arrays = []
        for first, *inside in columns:
            array = batch.column(first)
            array = pyarrow.compute.struct_field(array, inside) if inside else array  # pyright: ignore[reportAttributeAccessIssue]
            array = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
            # As bytes: one text that is not UTF-8 is one malformed record.
            arrays.append(array.cast(pa.large_binary()).to_pylist())
        for values in zip(*arrays, strict=True):
            yield f"row {next(number)}", list(values)
