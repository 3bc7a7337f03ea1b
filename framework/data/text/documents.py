"""Documents of text data sets: from the vendored sample, local files or a prepared tfds set."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Annotated, ClassVar

from etils import epath

from ...base.bounds import Within
from ...dataset import Split
from .. import samples
from ..reading import fields, files
from ..reading.malformed import Malformed
from .tokenized import Tokenized

_SAMPLE_HELD_OUT = 10  # every tenth article
_PLAIN = (".txt", "", ".text", ".md", ".rst", ".tex", ".raw", ".tokens")
_LONGEST_DOCUMENT = 1 << 30  # bytes; longer ones are malformed and not held in memory


@dataclasses.dataclass(frozen=True)
class DocumentData(Tokenized):
    """Base of data sets made of documents."""

    noun: ClassVar[str] = "documents"
    sample_file: ClassVar[str] = "enwiki-106.txt.xz"
    suffixes: ClassVar[tuple[str, ...]] = (*_PLAIN, ".tsv", *fields.FORMATS)
    feature_knobs: ClassVar[tuple[str, ...]] = ("text_key",)
    record: ClassVar[Callable[..., str]] = str
    text_of: ClassVar[Callable[[str], str]] = str

    source: str = "sample:enwiki"  # or "tfds:c4/en:3.1.0", "file:/path/*.txt", "file:/path/*.jsonl.zst"
    text_key: str = "text"  # field of .jsonl, .json, .parquet or .arrow, or tfds feature, that holds the document
    tsv_column: Annotated[int, Within(1)] = 1  # column of a .tsv file that holds the document; the first is 1

    def sample(self, split: Split) -> Iterator[str]:
        """Yield the vendored articles of a split."""
        articles = [text for text in re.split("\r?\n?\f", samples.read(self.sample_file).decode()) if text]
        for number, article in enumerate(articles, start=1):
            if (number % _SAMPLE_HELD_OUT == 0) == (split == "heldout"):
                yield article

    def read(self, path: epath.Path) -> Iterator[str | Malformed]:
        """Yield the documents of a UTF-8 file: one, or several separated by form feeds; of other formats one a row.

        Documents of white space only are left out.
        """
        texts = _texts(path) if files.suffix(path) in _PLAIN else self._column(path)
        return (text for text in texts if isinstance(text, Malformed) or (text and not text.isspace()))

    def cut(self, path: epath.Path, size: int) -> Iterator[str | Malformed]:
        """Yield a text file in parts that end at line ends, where it has any, and at form feeds."""
        if files.suffix(path) not in _PLAIN:
            yield from self.read(path)
            return
        held, number = b"", 0
        for chunk in itertools.chain(files.chunks(path), [b""]):
            held += chunk
            while len(held) >= 2 * size or (held and not chunk):
                end = held.find(b"\n", size, 2 * size) + 1 or size
                while end < len(held) and held[end] & 0xC0 == 0x80:  # inside a character
                    end += 1
                number += 1
                text = _decoded(held[:end], f"{path}, part {number}")
                yield from [text] if isinstance(text, Malformed) else filter(str.strip, text.split("\f"))
                held = held[end:]

    def _column(self, path: epath.Path) -> Iterator[str | Malformed]:
        for row in fields.columns(path, self.keys, {"tsv_column": self.tsv_column}):
            yield row if isinstance(row, Malformed) else row[0]


def _texts(path: epath.Path) -> Iterator[str | Malformed]:
    for number, content in enumerate(files.pieces(path, b"\f", _LONGEST_DOCUMENT), start=1):
        place = f"{path}, document {number}"
        if content is None:
            yield Malformed(place, f"more than {_LONGEST_DOCUMENT:,} bytes")
        else:
            if content.endswith(b"\f"):  # neither it nor the one newline before it belongs to the document
                content = content[:-1].removesuffix(b"\n").removesuffix(b"\r")
            yield _decoded(content, place)


def _decoded(content: bytes, place: str) -> str | Malformed:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        return Malformed(place, f"not UTF-8 at byte {error.start}")
