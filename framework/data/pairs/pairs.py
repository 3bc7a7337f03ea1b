"""Sentence pairs for translation, tokenized once into shards of rows with one vocabulary for both languages."""

import dataclasses
import itertools
import operator
import os
from collections.abc import Callable, Iterator
from typing import Annotated, ClassVar, NamedTuple

import jax
import numpy as np
from etils import epath

from ...base.bounds import Within
from ...base.errors import UserError
from ...dataset import Decoder, Split
from .. import samples
from ..preparing.manifests import Manifest
from ..preparing.preparing import Tally
from ..reading import fields
from ..reading.malformed import Malformed
from ..reading.sources import Stream
from ..text.tokenized import Tokenized
from ..text.tokenizer import END_OF_DOCUMENT, SMALLEST_VOCABULARY, Tokenizer, encode, load_tokenizer, train_tokenizer
from .packing import COLUMNS, END, Packer, TokenPair

_SAMPLE_SPLITS = {"validation": 0, "test": 1}  # (7 * book + chapter) % 20; other chapters are trained on
_TOO_LONG, _EMPTY = "too long for a row", "with an empty side"


class Pair(NamedTuple):
    """A sentence and its translation; either may be empty."""

    source: str
    target: str


@dataclasses.dataclass(frozen=True)
class PairData(Tokenized):
    """Sentence pairs from the vendored sample, files or a prepared tfds set, as rows of fixed lengths.

    A training row holds one or several pairs, a held-out row holds one. The cache holds `tokenizer-HASH.json` and
    `rows-HASH/`, named by a hash of the settings and the source, so that other settings or a changed source never use
    old files. Malformed pairs are skipped. Pairs with an empty side and training pairs longer than a row are dropped.
    """

    noun: ClassVar[str] = "pairs"
    version: ClassVar[int] = 3
    packing_knobs: ClassVar[tuple[str, ...]] = ("source_length", "target_length", "pairs_per_row")
    sample_file: ClassVar[str] = "web-lsg-nt.en-fr.tsv.xz"
    suffixes: ClassVar[tuple[str, ...]] = (".tsv", ".txt", "", *fields.FORMATS)
    feature_knobs: ClassVar[tuple[str, ...]] = ("source_key", "target_key")
    record: ClassVar[Callable[..., Pair]] = Pair
    text_of: ClassVar[Callable[[Pair], str]] = operator.attrgetter("source")  # no held-out source is trained on

    source: str = "sample:nt"  # or "tfds:wmt14_translate/fr-en:1.0.0", "file:/path/*.tsv"
    source_length: Annotated[int, Within(2, 2**24)] = 128  # source tokens in a row, including the end of each sentence
    target_length: Annotated[int, Within(2, 2**24)] = 128  # target tokens in a row, including the end of each sentence
    pairs_per_row: Annotated[int, Within(0)] = 0  # largest number of pairs in a training row; 0 packs as many as fit
    vocab_size: Annotated[int, Within(SMALLEST_VOCABULARY, 2**24)] = 2048  # tokens of both languages and the end
    source_key: str = "en"  # field of .jsonl, .json, .parquet or .arrow, or tfds feature, to translate from
    target_key: str = "fr"  # such a field or feature to translate into
    source_column: Annotated[int, Within(1)] = 1  # column of a .tsv file to translate from; the first is 1
    target_column: Annotated[int, Within(1)] = 2  # column of a .tsv file to translate into
    heldout_split: str = "test"  # tfds split, or chapters of the sample (validation or test), to evaluate on
    tokenizer: str = ""  # tokenizers JSON file with "<|endoftext|>" as token 0; "" trains one on the training pairs

    def __post_init__(self):
        super().__post_init__()
        if self.source.startswith("sample:") and self.heldout_split not in _SAMPLE_SPLITS:
            raise ValueError(
                f"data.heldout_split={self.heldout_split!r}: {self.source} holds out "
                f"{' or '.join(map(repr, _SAMPLE_SPLITS))}"
            )

    @property
    def tokens_per_example(self) -> int:
        """Target slots of a row."""
        return self.target_length

    def sample(self, split: Split) -> Iterator[Pair]:
        """Yield verses of the New Testament, by chapter; held-out sources that training has are left out."""
        verses: list[tuple[int, Pair]] = []
        for line in samples.read(self.sample_file).decode().removesuffix("\n").split("\n"):
            place, *pair = line.split("\t")
            book, chapter, _ = map(int, place.split("."))
            verses.append(((7 * book + chapter) % 20, Pair(*pair)))
        train = [pair for group, pair in verses if group not in _SAMPLE_SPLITS.values()]
        if split == "train":
            return iter(train)
        heldout, known = _SAMPLE_SPLITS[self.heldout_split], {pair.source for pair in train}
        return (pair for group, pair in verses if group == heldout and pair.source not in known)

    def read(self, path: epath.Path) -> Iterator[Pair | Malformed]:
        """Yield the pairs of a file, one a row."""
        columns = {name: getattr(self, name) for name in ("source_column", "target_column")}
        for row in fields.columns(path, self.keys, columns):
            yield row if isinstance(row, Malformed) else Pair(*row)

    def load(self, path: epath.Path) -> Tokenizer:
        """See `Tokenized.load`."""
        tokenizer = load_tokenizer(path, self.vocab_size)
        end = tokenizer.token_to_id(END_OF_DOCUMENT)
        if end != END:
            raise UserError(
                f"data.tokenizer={path}: has {END_OF_DOCUMENT} as token {end}; pairs need it as token {END}"
            )
        return tokenizer

    def train(self, records: Iterator[Pair]) -> Tokenizer:
        """See `Tokenized.train`; uses both sides."""
        return train_tokenizer(filter(None, itertools.chain.from_iterable(records)), self.vocab_size)

    def rows(
        self, stream: Stream, number: int, records: Iterator[Pair], tokenizer: str, tally: Tally
    ) -> Iterator[bytes]:
        """See `Preparable.rows`.

        Raises:
          UserError: a held-out pair is longer than a row.
        """
        loaded = self.load(epath.Path(tokenizer))
        packer, longest = self._packer(stream.split or "train"), (0, 0)

        def sides() -> Iterator[str]:
            for pair in records:
                if pair.source.strip() and pair.target.strip():
                    yield from pair
                else:
                    tally.dropped[_EMPTY] += 1

        def fitting() -> Iterator[TokenPair]:
            nonlocal longest
            encoded = encode(loaded, sides(), END, END)
            for (source_text, source), (target_text, target) in zip(encoded, encoded, strict=True):
                source, target = source[1:-1], target[1:-1]  # without ends
                tally.counts.update(
                    pairs=1, characters=len(source_text) + len(target_text), tokens=len(source) + len(target)
                )
                if packer.holds(1, len(source), len(target)):
                    yield source, target
                else:
                    tally.dropped[_TOO_LONG] += 1
                    longest = max(longest[0], len(source) + 1), max(longest[1], len(target) + 1)

        yield from packer.pack(fitting())
        if stream.split == "heldout" and tally.dropped[_TOO_LONG]:
            raise UserError(
                f"data.source_length={self.source_length} and data.target_length={self.target_length}: "
                f"{tally.dropped[_TOO_LONG]} held-out pairs are longer, up to {longest[0]} source and {longest[1]} "
                "target tokens. Raise these knobs; held-out pairs are never cut."
            )

    def row_decoder(self, split: Split, folder: epath.Path, manifest: Manifest) -> Packer:
        """See `Preparable.row_decoder`."""
        return self._packer(split)

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shape and type of the arrays of a row."""
        return {
            name: jax.ShapeDtypeStruct(
                (self.source_length if name.startswith("source") else self.target_length + 1,), np.int32
            )
            for name in COLUMNS
        }

    def decoder(self, cache: str | os.PathLike[str]) -> Decoder:
        """Return a function that decodes token ids to text, up to the first end."""
        tokenizer = self.load_tokenizer(cache)

        def decode(tokens: np.ndarray) -> str:
            ends = np.flatnonzero(tokens == END)
            return tokenizer.decode(tokens[: ends[0] if len(ends) else None].tolist(), skip_special_tokens=False)

        return decode

    def _packer(self, split: Split) -> Packer:
        most = self.pairs_per_row if split == "train" else 1
        return Packer(self.source_length, self.target_length, most, self.vocab_size)
