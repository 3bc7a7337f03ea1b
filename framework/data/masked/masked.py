"""Text for BERT: documents cut into pairs of texts once, in shards; then read by row at random, and masked anew."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import numpy as np
from etils import epath

from ...base.errors import UserError
from ...dataset import SPLITS, Decoder, Split
from ..preparing import manifests
from ..preparing.jobs import Ingredients, Tally
from ..preparing.manifests import Manifest
from ..preparing.streams import Stream
from ..reading.shards import ShardRows
from ..text.document_knobs import check_knobs, documents_of, split_settings
from ..text.documents import Documents
from ..text.tokenized import Tokenized
from ..text.tokenizer import Tokenizer, refusing
from ..text.wordpiece import SMALLEST_VOCABULARY, Vocabulary, load_wordpiece, train_wordpiece, vocabulary_of
from .masking import Row, masked_row, unigram_nats
from .next_sentence import groups, pairs, split_sentences
from .next_sentence_rows import PairRow

# Part of every cache name: raise it when the meaning of cached files changes.
_CACHE_FORMAT = 2
_PAIRS_SEED = 20_181_011  # of the pairs, which are the same whatever the run's seed
_MASKS_SEED = 20_190_524  # of the held-out rows' masks, likewise
_COUNTS = "token_counts.npy"  # of the training rows, int64 [V]
_GROUP = 1_000  # documents that a random second text may come from
_ALONE = "alone in the last shard"


@dataclasses.dataclass(frozen=True)
class MaskedTextData(Tokenized):
    """Documents from a vendored sample, local files or a prepared tfds set, as masked pairs of texts.

    A row is [CLS] first text [SEP] second text [SEP] and padding. The cache holds `tokenizer-HASH.json` and
    `rows-HASH/`, named by a hash of the settings and of the source. Rows are masked when they are read: training rows
    by random numbers of their step and place, held-out ones by their number, always in the same way.
    """

    noun: ClassVar[str] = "documents"
    row_settings: ClassVar[tuple[str, ...]] = ("sequence_length", "short_rate")

    source: str = "sample:enwiki"  # or "tfds:wikipedia/20230601.en:1.0.0", "file:/path/*.txt", "file:/path/*.tsv.xz"
    sequence_length: int = 128  # tokens in a row, the three special ones included
    vocab_size: int = 30_522  # tokens, the five special ones included
    mask_rate: float = 0.15  # share of a row's tokens that are to be restored
    predictions: int = 20  # of a row, at most: the share rounded up to what shapes are fixed to
    short_rate: float = 0.1  # share of the pairs that are short on purpose
    lower_case: bool = True  # lower case without accents, where the tokenizer is trained here
    data_dir: str = ""  # where tfds sets lie, local or gs://; "" is $TFDS_DATA_DIR or ~/tensorflow_datasets
    text_key: str = "text"  # feature of a tfds set that holds the document
    tsv_column: int = 1  # of a .tsv file, the column that holds the document; the first is 1
    train_split: str = "train[:99%]"  # tfds split to train on; Wikipedia has no other than "train"
    heldout_split: str = "train[99%:]"  # tfds split to evaluate on; samples and files use every 10th document
    tokenizer: str = ""  # tokenizers JSON file, WordPiece; "" trains one on the training documents
    max_documents: int = 0  # per split, malformed ones included, also for training the tokenizer; 0 takes all

    def __post_init__(self):
        super().__post_init__()
        check_knobs(self)
        if self.sequence_length < 8:
            raise ValueError(f"data.sequence_length is {self.sequence_length}; two texts and 3 tokens need at least 8")
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(f"data.vocab_size is {self.vocab_size}; it must be at least {SMALLEST_VOCABULARY}")
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"data.mask_rate is {self.mask_rate}; it must lie between 0 and 1")
        if not 1 <= self.predictions < self.sequence_length:
            raise ValueError(
                f"data.predictions is {self.predictions}; it must be at least 1 and less than "
                f"data.sequence_length {self.sequence_length}"
            )
        if not 0 <= self.short_rate <= 1:
            raise ValueError(f"data.short_rate is {self.short_rate}; it must lie between 0 and 1")

    @property
    def tokens_per_example(self) -> int:
        """Slots of a row."""
        return self.sequence_length

    @property
    def limit(self) -> int:
        """See `Tokenized.limit`."""
        return self.max_documents

    def open_source(self) -> Documents:
        """See `Preparable.open_source`."""
        return documents_of(self)

    def settings(self) -> dict[str, Any]:
        """See `Preparable.settings`; masks are made when rows are read."""
        return {
            "format": _CACHE_FORMAT,
            "source": self.source,
            "vocab_size": self.vocab_size,
            "lower_case": self.lower_case,
            "max_documents": self.max_documents,
            "tokenizer": self.tokenizer_digest(),
            "sequence_length": self.sequence_length,
            "short_rate": self.short_rate,
            "shard_size": self.shard_size,
        } | split_settings(self)

    def load(self, path: epath.Path) -> Tokenizer:
        """See `Tokenized.load`."""
        return load_wordpiece(path, self.vocab_size)

    def train(self, records: Iterator[str]) -> Tokenizer:
        """See `Tokenized.train`."""
        return train_wordpiece(records, self.vocab_size, lower_case=self.lower_case)

    def tools(self, ingredients: Ingredients) -> Tokenizer:
        """The tokenizer."""
        return self.load(epath.Path(ingredients.tokenizer))

    def rows(
        self, stream: Stream, number: int, records: Iterator[str], tools: Tokenizer, tally: Tally
    ) -> Iterator[bytes]:
        """See `Preparable.rows`; second texts come from the same shard; one document alone gives no rows.

        Raises:
          UserError: there is one document only to begin with.
        """

        def tokenized() -> Iterator[list[np.ndarray]]:
            for text in records:
                sentences = split_sentences(text)
                with refusing(f"the tokenizer fails on the document {text[:40]!r}...; use another"):
                    encodings = tools.encode_batch_fast(sentences, add_special_tokens=False)
                tokens = [np.array(each.ids, np.int32) for each in encodings if each.ids]
                tally.counts.update(documents=1, characters=len(text), tokens=sum(map(len, tokens)))
                yield tokens

        split: Split = stream.split or "train"
        # Shard 0 has the numbers of [seed, split]: a SeedSequence takes no notice of zeros at its end.
        rng = np.random.default_rng([_PAIRS_SEED, SPLITS.index(split), number])
        row = PairRow(vocabulary_of(tools), self.sequence_length)
        for group in groups(tokenized(), _GROUP):
            if len(group) < 2:
                if number:
                    tally.dropped[_ALONE] += 1
                    return
                raise UserError(
                    f"data.source {self.source!r} has 1 document to use in its {split} split and needs at least 2, "
                    "because second texts are drawn from other documents; give more"
                )
            for pair in pairs(group, capacity=self.sequence_length - 3, short_rate=self.short_rate, rng=rng):
                yield row.to_bytes(pair)

    def summary(self, folder: epath.Path, manifest: Manifest) -> dict[str, Any]:
        """The vocabulary; and beside the manifest, how often each of its tokens stands in the training rows."""
        vocabulary = vocabulary_of(self.load(self.tokenizer_of(folder, manifest)))
        noted = {"vocabulary": vocabulary._asdict()}
        row, counts = PairRow(vocabulary, self.sequence_length), np.zeros(vocabulary.size, np.int64)
        for content in self._unmasked("train", folder, manifest | noted).raw():
            np.add.at(counts, row.tokens(content), 1)
        with (folder / _COUNTS).open("wb") as file:
            np.save(file, counts)
        return noted

    def say(self, folder: epath.Path, manifest: Manifest) -> None:
        """See `Preparable.say`; and what a model is to be measured against."""
        super().say(folder, manifest)
        nats = self._unigram_nats(folder, manifest)
        print(f"held-out masked tokens: {nats:.3f} nats each by their frequencies alone", file=sys.stderr, flush=True)

    def examples(self, split: Split, cache: str | os.PathLike[str]) -> "ShardRows | MaskedRows":
        """The rows of a split: random access, picklable; those of "train" are yet to be masked by `augment`.

        Raises:
          UserError: nothing is prepared for these settings in `cache`.
        """
        unmasked = self._unmasked(split, *self.manifest(cache))
        return unmasked if split == "train" else MaskedRows(unmasked, self)

    def augment(self, example: Row, rng: np.random.Generator) -> Row:
        """A row of `PairRows` with masks: the arrays that `spec` tells."""
        vocabulary = Vocabulary(*example["vocabulary"].tolist())
        masks = masked_row(
            example["tokens"],
            example["segments"],
            vocabulary,
            rng,
            rate=self.mask_rate,
            predictions=self.predictions,
        )
        return {name: array for name, array in example.items() if name != "vocabulary"} | masks

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of a masked row's arrays."""
        row, prediction = (self.sequence_length,), (self.predictions,)
        shapes = {"tokens": row, "segments": row, "is_next": ()}
        shapes |= {"masked_positions": prediction, "masked_tokens": prediction}
        return {name: jax.ShapeDtypeStruct(shape, np.int32) for name, shape in shapes.items()}

    def fingerprint(self, cache: str | os.PathLike[str]) -> str:
        """Hash of both splits' rows and of what decides masks.

        Raises:
          UserError: nothing is prepared for these settings in `cache`.
        """
        manifest = self.manifest(cache)[1]
        return manifests.digest([manifest["content"], self._vocabulary(manifest), self.mask_rate, self.predictions])

    def decoder(self, cache: str | os.PathLike[str]) -> Decoder:
        """Text of tokens, special ones included."""
        tokenizer = self.load_tokenizer(cache)
        return lambda tokens: tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=False)

    def unigram_loss(self, cache: str | os.PathLike[str]) -> float:
        """Nats per held-out masked token of one who knows only how frequent tokens are in training.

        Raises:
          UserError: nothing is prepared for these settings in `cache`.
        """
        return self._unigram_nats(*self.manifest(cache))

    def _unigram_nats(self, folder: epath.Path, manifest: Manifest) -> float:
        vocabulary = self._vocabulary(manifest)
        try:
            with (folder / _COUNTS).open("rb") as file:
                train = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / _COUNTS} cannot be read; remove {folder}, and it is made again") from error
        heldout = np.zeros(vocabulary.size, np.int64)
        masked = MaskedRows(self._unmasked("heldout", folder, manifest), self)
        for index in range(len(masked)):
            example = masked[index]
            np.add.at(heldout, example["masked_tokens"][example["masked_positions"] > 0], 1)
        return unigram_nats(train, heldout, vocabulary)

    def _unmasked(self, split: Split, folder: epath.Path, manifest: Manifest) -> ShardRows:
        decode = PairRow(self._vocabulary(manifest), self.sequence_length)
        return ShardRows(*manifests.of_split(folder, manifest, split), decode)

    def _vocabulary(self, manifest: Manifest) -> Vocabulary:
        try:
            return Vocabulary(**manifest["vocabulary"])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{manifests.NAME} for {self.source} is damaged; remove its folder and prepare again"
            ) from error


class MaskedRows:
    """Rows masked in a way that is a function of their number alone."""

    def __init__(self, rows: ShardRows, data: MaskedTextData):
        self._rows, self._data = rows, data

    def __repr__(self) -> str:
        return repr(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._data.augment(self._rows[index], np.random.default_rng([_MASKS_SEED, index]))
