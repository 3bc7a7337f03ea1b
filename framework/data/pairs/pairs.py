"""Sentence pairs for translation, tokenized once into shards of rows with one vocabulary for both languages."""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import jax
import numpy as np
from etils import epath

from ...base.errors import UserError
from ...dataset import Decoder, Split
from ..preparing.manifests import Manifest
from ..preparing.preparing import Ingredients, Tally
from ..preparing.streams import Stream
from ..reading.malformed import Malformed
from ..reading.sources import Source
from ..text.tokenized import Tokenized
from ..text.tokenizer import END_OF_DOCUMENT, SMALLEST_VOCABULARY, Tokenizer, encode, load_tokenizer, train_tokenizer
from .packing import COLUMNS, END, Packer, Room, TokenPair
from .sources import Pair, open_pairs

_TOO_LONG, _EMPTY, _REPEATED = "too long for a row", "with an empty side", "whose source is trained on"


@dataclasses.dataclass(frozen=True)
class PairData(Tokenized):
    """Sentence pairs from the vendored sample, local TSV files or a prepared tfds set, as rows of fixed lengths.

    A training row holds one or several pairs, a held-out row holds one. The cache holds `tokenizer-HASH.json` and
    `rows-HASH/`, named by a hash of the settings and the source, so that other settings or a changed source never use
    old files. Malformed pairs are skipped. Pairs with an empty side and training pairs longer than a row are dropped;
    except from tfds sets, also held-out pairs whose source occurs in training.
    """

    noun: ClassVar[str] = "pairs"
    version: ClassVar[int] = 2
    packing_knobs: ClassVar[tuple[str, ...]] = ("source_length", "target_length", "pairs_per_row")

    source: str = "sample:nt"  # or "tfds:wmt14_translate/fr-en:1.0.0", "file:/path/*.tsv"
    source_length: int = 128  # source tokens in a row, including the end of each sentence
    target_length: int = 128  # target tokens in a row, including the end of each sentence
    pairs_per_row: int = 0  # largest number of pairs in a training row; 0 packs as many as fit
    vocab_size: int = 2048  # tokens of both languages, including the end of a sentence and the 256 bytes
    data_dir: str = ""  # folder of tfds sets, local or gs://; "" uses $TFDS_DATA_DIR or ~/tensorflow_datasets
    source_key: str = "en"  # feature of a tfds set to translate from
    target_key: str = "fr"  # feature of a tfds set to translate into
    source_column: int = 1  # column of a .tsv file to translate from; the first is 1
    target_column: int = 2  # column of a .tsv file to translate into
    train_split: str = "train"  # tfds split to train on
    heldout_split: str = "test"  # tfds split or chapters of the sample to evaluate on; files use every 10th row
    tokenizer: str = ""  # tokenizers JSON file, byte-level BPE; "" trains one on both sides of the training pairs
    max_pairs: int = 0  # per split, malformed ones included, also for training the tokenizer; 0 takes all

    def __post_init__(self):
        super().__post_init__()
        if self.source.partition(":")[0] not in ("sample", "file", "tfds"):
            raise ValueError(
                f"data.source={self.source!r}: write 'sample:nt', 'file:/path/*.tsv' or "
                "'tfds:wmt14_translate/fr-en:1.0.0'"
            )
        least = {"source_length": 2, "target_length": 2, "source_column": 1, "target_column": 1}
        for name, bound in (least | {"pairs_per_row": 0, "max_pairs": 0}).items():
            if getattr(self, name) < bound:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be at least {bound}")
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(f"data.vocab_size={self.vocab_size}: bytes alone need {SMALLEST_VOCABULARY}")

    @property
    def tokens_per_example(self) -> int:
        """Target slots of a row."""
        return self.target_length

    def open_source(self) -> Source[Pair]:
        """See `Preparable.open_source`."""
        names = "data_dir source_key target_key source_column target_column train_split heldout_split"
        return open_pairs(self.source, **{name: getattr(self, name) for name in names.split()})

    def row_knobs(self) -> Sequence[str]:
        """See `Preparable.row_knobs`."""
        kind = self.source.partition(":")[0]
        chosen = {"sample": ("heldout_split",), "file": ("source_column", "target_column")}.get(
            kind, ("source_key", "target_key", "train_split", "heldout_split")
        )
        names = ("source", "vocab_size", "max_pairs", "tokenizer", *self.packing_knobs, "shard_size")
        return (*names, *chosen)

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

    def ingredients(self, cache: epath.Path, source: Source[Pair]) -> Ingredients:
        """Return the tokenizer and the held-out sources that occur in training.

        The splits of tfds sets are those that others report results on: nothing is dropped from them.
        """
        found = super().ingredients(cache, source)
        official = self.source.startswith("tfds:")
        return found if official else dataclasses.replace(found, known=self._trained_on(source))

    def tools(self, ingredients: Ingredients) -> tuple[Tokenizer, frozenset[str]]:
        """Return the tokenizer and the held-out sources that occur in training."""
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
                f"data.source_length={self.source_length} and data.target_length={self.target_length}: "
                f"{tally.dropped[_TOO_LONG]} held-out pairs are longer, up to {longest[0]} source and {longest[1]} "
                "target tokens. Raise these knobs; held-out pairs are never cut."
            )

    def row_decoder(self, split: Split, folder: epath.Path, manifest: Manifest) -> Packer:
        """See `Preparable.row_decoder`."""
        return Packer(self._room(split), self.vocab_size)

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

    def _room(self, split: Split) -> Room:
        return Room(self.source_length, self.target_length, self.pairs_per_row if split == "train" else 1)

    def _trained_on(self, pairs: Source[Pair]) -> frozenset[str]:
        """Return the held-out sources that occur in training."""

        def sources(split: Split) -> Iterator[str]:
            for pair in itertools.islice(pairs.stream(split), self.max_pairs or None):
                if not isinstance(pair, Malformed):
                    yield pair.source

        heldout = set(sources("heldout"))
        return frozenset(source for source in sources("train") if source in heldout)


def _tokens(tokenizer: Tokenizer, pairs: Iterable[Pair]) -> Iterator[tuple[Pair, np.ndarray, np.ndarray]]:
    """Yield pairs with the tokens of both sides, without ends."""
    kept, sources, targets = itertools.tee(pairs, 3)
    encoded = (
        encode(tokenizer, (pair.source for pair in sources)),
        encode(tokenizer, (pair.target for pair in targets)),
    )
    for pair, (_, source), (_, target) in zip(kept, *encoded, strict=True):
        yield pair, source[1:-1], target[1:-1]
