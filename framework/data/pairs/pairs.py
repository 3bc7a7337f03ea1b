"""Sentence pairs for translation: tokenized once into shards of rows by a vocabulary of both languages, read by row."""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import jax
import numpy as np
from etils import epath

from ...base.errors import UserError
from ...dataset import Decoder, Split
from ..preparing import manifests
from ..preparing.jobs import Ingredients, Tally
from ..preparing.streams import Stream
from ..reading.records import Malformed
from ..reading.shards import ShardRows
from ..text.tokenized import Tokenized
from ..text.tokenizer import END_OF_DOCUMENT, SMALLEST_VOCABULARY, Tokenizer, encode, load_tokenizer, train_tokenizer
from .pair_packing import COLUMNS, END, Packer, Room, TokenPair
from .pair_sources import Pair, Pairs, open_pairs

# Part of every cache name: raise it when the meaning of cached files changes.
_CACHE_FORMAT = 2
_TOO_LONG, _EMPTY, _REPEATED = "too long for a row", "with an empty side", "whose source is trained on"


@dataclasses.dataclass(frozen=True)
class PairData(Tokenized):
    """Sentence pairs from the vendored sample, local TSV files or a prepared tfds set, as rows of fixed lengths.

    A row to train on holds one pair or several, one to be judged by holds one. The cache holds `tokenizer-HASH.json`
    and `rows-HASH/`, named by a hash of the settings and of the source, so that other settings or a changed source
    never meet old files. Malformed pairs are skipped; pairs with an empty side are dropped, and training pairs that are
    longer than a row; of sources without official splits also held-out pairs whose source is trained on.
    """

    noun: ClassVar[str] = "pairs"
    row_settings: ClassVar[tuple[str, ...]] = ("source_length", "target_length", "pairs_per_row")

    source: str = "sample:nt"  # or "tfds:wmt14_translate/fr-en:1.0.0", "file:/path/*.tsv"
    source_length: int = 128  # source tokens in a row, the end of each sentence included
    target_length: int = 128  # target tokens in a row, likewise
    pairs_per_row: int = 0  # most pairs in a row that is trained on; 0 is as many as fit, which wastes least
    vocab_size: int = 2048  # tokens of both languages together, the end of a sentence and the 256 bytes included
    data_dir: str = ""  # where tfds sets lie, local or gs://; "" is $TFDS_DATA_DIR or ~/tensorflow_datasets
    source_key: str = "en"  # feature of a tfds set that is translated from; supervised order is no matter
    target_key: str = "fr"  # feature of a tfds set that is translated into
    source_column: int = 1  # of a .tsv file, the column that is translated from; the first is 1
    target_column: int = 2  # of a .tsv file, the column that is translated into
    train_split: str = "train"  # tfds split to train on
    heldout_split: str = "test"  # tfds split or chapters of the sample to evaluate on; files use every 10th row
    tokenizer: str = ""  # tokenizers JSON file, byte-level BPE; "" trains one on both sides of the training pairs
    max_pairs: int = 0  # per split, malformed ones included, also for training the tokenizer; 0 takes all

    def __post_init__(self):
        super().__post_init__()
        if self.source.partition(":")[0] not in ("sample", "file", "tfds"):
            raise ValueError(
                f"data.source is {self.source!r}; write 'sample:nt', 'file:/path/*.tsv' or "
                "'tfds:wmt14_translate/fr-en:1.0.0'"
            )
        for name, least in (("source_length", 2), ("target_length", 2), ("source_column", 1), ("target_column", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("pairs_per_row", "max_pairs"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must not be negative")
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(f"data.vocab_size is {self.vocab_size}; bytes alone need {SMALLEST_VOCABULARY}")

    @property
    def tokens_per_example(self) -> int:
        """Target slots of a row."""
        return self.target_length

    @property
    def limit(self) -> int:
        """See `Tokenized.limit`."""
        return self.max_pairs

    def open_source(self) -> Pairs:
        """See `Preparable.open_source`."""
        return open_pairs(
            self.source,
            data_dir=self.data_dir,
            source_key=self.source_key,
            target_key=self.target_key,
            source_column=self.source_column,
            target_column=self.target_column,
            train_split=self.train_split,
            heldout_split=self.heldout_split,
        )

    def settings(self) -> dict[str, Any]:
        """See `Preparable.settings`; `max_malformed` only decides whether there are any rows."""
        kind = self.source.partition(":")[0]
        chosen = {"sample": ("heldout_split",), "file": ("source_column", "target_column")}.get(
            kind, ("source_key", "target_key", "train_split", "heldout_split")
        )
        return {
            "format": _CACHE_FORMAT,
            "source": self.source,
            "vocab_size": self.vocab_size,
            "max_pairs": self.max_pairs,
            "tokenizer": self.tokenizer_digest(),
            "source_length": self.source_length,
            "target_length": self.target_length,
            "pairs_per_row": self.pairs_per_row,
            "shard_size": self.shard_size,
        } | {name: getattr(self, name) for name in chosen}

    def load(self, path: epath.Path) -> Tokenizer:
        """See `Tokenized.load`."""
        tokenizer = load_tokenizer(path, self.vocab_size)
        end = tokenizer.token_to_id(END_OF_DOCUMENT)
        if end != END:
            raise UserError(f"data.tokenizer {path} has {END_OF_DOCUMENT} as token {end}; pairs need it as token {END}")
        return tokenizer

    def train(self, records: Iterator[Pair]) -> Tokenizer:
        """See `Tokenized.train`; of both sides."""
        return train_tokenizer(filter(None, itertools.chain.from_iterable(records)), self.vocab_size)

    def ingredients(self, cache: epath.Path, source: Pairs) -> Ingredients:
        """The tokenizer, and the held-out sources that are trained on."""
        found = super().ingredients(cache, source)
        return found if source.official else dataclasses.replace(found, known=self._trained_on(source))

    def tools(self, ingredients: Ingredients) -> tuple[Tokenizer, frozenset[str]]:
        """The tokenizer, and the held-out sources that are trained on."""
        return self.load(epath.Path(ingredients.tokenizer)), ingredients.known

    def rows(
        self,
        stream: Stream,
        number: int,
        records: Iterator[Pair],
        tools: tuple[Tokenizer, frozenset[str]],
        tally: Tally,
    ) -> Iterator[bytes]:
        """See `Preparable.rows`.

        Raises:
          UserError: a held-out pair is longer than a row.
        """
        tokenizer, known = tools
        split: Split = stream.split or "train"
        room, longest = self._room(split), (0, 0)

        def kept() -> Iterator[Pair]:
            for pair in records:
                if not (pair.source and pair.target):
                    tally.dropped[_EMPTY] += 1
                elif split == "heldout" and pair.source in known:
                    tally.dropped[_REPEATED] += 1
                else:
                    yield pair

        def fitting() -> Iterator[TokenPair]:
            nonlocal longest
            for pair, source, target in _tokens(tokenizer, kept()):
                tally.counts.update(
                    pairs=1, characters=len(pair.source) + len(pair.target), tokens=len(source) + len(target)
                )
                if room.holds(1, len(source), len(target)):
                    yield source, target
                else:
                    tally.dropped[_TOO_LONG] += 1
                    longest = max(longest[0], len(source) + 1), max(longest[1], len(target) + 1)

        yield from Packer(room, self.vocab_size).pack(fitting())
        if split == "heldout" and tally.dropped[_TOO_LONG]:
            raise UserError(
                f"{tally.dropped[_TOO_LONG]} held-out pairs are longer than a row: they have up to {longest[0]} "
                f"source and {longest[1]} target tokens, data.source_length is {self.source_length} and "
                f"data.target_length {self.target_length}; raise these, for held-out pairs are never cut"
            )

    def examples(self, split: Split, cache: str | os.PathLike[str]) -> ShardRows:
        """The rows of a split that `prepare` has made: random access, picklable.

        Raises:
          UserError: nothing is prepared for these settings in `cache`.
        """
        folder, manifest = self.manifest(cache)
        return ShardRows(*manifests.of_split(folder, manifest, split), Packer(self._room(split), self.vocab_size))

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of a row's arrays."""
        return {
            name: jax.ShapeDtypeStruct(
                (self.source_length if name.startswith("source") else self.target_length + 1,), np.int32
            )
            for name in COLUMNS
        }

    def decoder(self, cache: str | os.PathLike[str]) -> Decoder:
        """Turns token ids into text, up to the first end."""
        tokenizer = self.load_tokenizer(cache)

        def decode(tokens: np.ndarray) -> str:
            ends = np.flatnonzero(tokens == END)
            return tokenizer.decode(tokens[: ends[0] if len(ends) else None].tolist(), skip_special_tokens=False)

        return decode

    def _room(self, split: Split) -> Room:
        return Room(self.source_length, self.target_length, self.pairs_per_row if split == "train" else 1)

    def _trained_on(self, pairs: Pairs) -> frozenset[str]:
        """The held-out sources that are trained on, too."""

        def sources(split: Split) -> Iterator[str]:
            for pair in itertools.islice(pairs.stream(split), self.max_pairs or None):
                if not isinstance(pair, Malformed):
                    yield pair.source

        heldout = set(sources("heldout"))
        return frozenset(source for source in sources("train") if source in heldout)


def _tokens(tokenizer: Tokenizer, pairs: Iterable[Pair]) -> Iterator[tuple[Pair, np.ndarray, np.ndarray]]:
    """Pairs with the tokens of both sides, without ends."""
    kept, sources, targets = itertools.tee(pairs, 3)
    encoded = (
        encode(tokenizer, (pair.source for pair in sources)),
        encode(tokenizer, (pair.target for pair in targets)),
    )
    for pair, (_, source), (_, target) in zip(kept, *encoded, strict=True):
        yield pair, source[1:-1], target[1:-1]
