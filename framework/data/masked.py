"""Text for BERT: documents cut into pairs of texts once, in the cache; then read by row at random, and masked anew."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..errors import UserError
from ..workdir import read_json
from . import packing
from .contract import Decoder
from .documents import Documents
from .masking import Row, masked_row, unigram_nats
from .next_sentence import Pair, groups, pairs, split_sentences
from .next_sentence_rows import PairRows, write_pairs
from .records import Rejects
from .rows import are_there, check_knobs, digest, documents_of, read_stamp, say_skipped, stream, tokenizer_digest
from .splits import SPLITS, Split
from .tokenizer import Tokenizer, refusing
from .wordpiece import SMALLEST_VOCABULARY, Vocabulary, load_wordpiece, train_wordpiece, vocabulary_of

# Part of every cache name: raise it when the meaning of cached files changes.
_CACHE_FORMAT = 1
_PAIRS_SEED = 20_181_011  # of the pairs, which are the same whatever the run's seed
_MASKS_SEED = 20_190_524  # of the held-out rows' masks, likewise
_GROUP = 1_000  # documents that a random second text may come from


@dataclasses.dataclass(frozen=True)
class MaskedTextData:
    """Documents from a vendored sample, local files or a prepared tfds set, as masked pairs of texts.

    A row is [CLS] first text [SEP] second text [SEP] and padding. The cache holds `wordpiece-HASH.json` and
    `pairs-HASH/`, named by a hash of the settings and of the source. Rows are masked when they are read: training rows
    by random numbers of their step and place, held-out ones by their number, always in the same way.
    """

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
    max_documents: int = 0  # per split, for pairs and for training the tokenizer; 0 takes all
    max_malformed: int = 0  # documents of a split that may be skipped; 0, so that nobody's data shrink unasked

    def __post_init__(self):
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

    def prepare(self, cache: Path) -> None:
        """Train the tokenizer and write both splits' pairs into `cache`, unless they are there already.

        For one process, before any other reads. Streams the source; a failure leaves no partial rows behind. Malformed
        documents are skipped; how many, and the first few, is said on stderr, and so is what a model is to be measured
        against: the loss of one that knows only how frequent tokens are.

        Raises:
          UserError: the source or the tokenizer file cannot be used, and nothing has been written; or a split has more
            than `max_malformed` malformed documents, or one document only.
        """
        documents = documents_of(self)
        rows = self._rows_path(cache, documents)
        if not are_there(rows, self.max_malformed):
            tokenizer = self._given_tokenizer() or self._trained_tokenizer(cache, documents)
            with packing.AtomicDirectory(rows) as partial:
                self._write(partial, documents, tokenizer)
        print(
            f"held-out masked tokens: {self.unigram_loss(cache):.3f} nats each by their frequencies alone",
            file=sys.stderr,
            flush=True,
        )

    def examples(self, split: Split, cache: Path) -> "PairRows | MaskedRows":
        """The rows of a split: random access, picklable; those of "train" are yet to be masked by `augment`.

        Raises:
          UserError: nothing is prepared for these settings in `cache`.
        """
        rows = self._prepared(cache)
        unmasked = PairRows(rows / split, self._vocabulary(rows))
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

    def fingerprint(self, cache: Path) -> str:
        """Hash of the content of both splits' rows and of what decides masks.

        Raises:
          UserError: nothing is prepared for these settings in `cache`.
        """
        rows = self._prepared(cache)
        content = read_stamp(rows, self.max_malformed)[0]
        return digest([content, self._vocabulary(rows), self.mask_rate, self.predictions])

    def decoder(self, cache: Path) -> Decoder:
        """Text of tokens, special ones included."""
        tokenizer = self._given_tokenizer() or load_wordpiece(
            self._tokenizer_path(cache, documents_of(self)), self.vocab_size
        )
        return lambda tokens: tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=False)

    def unigram_loss(self, cache: Path) -> float:
        """Nats per held-out masked token of one who knows only how frequent tokens are in training.

        Raises:
          UserError: nothing is prepared for these settings in `cache`.
        """
        rows = self._prepared(cache)
        vocabulary = self._vocabulary(rows)
        train = PairRows(rows / "train", vocabulary).token_counts()
        heldout = np.zeros(vocabulary.size, np.int64)
        masked = self.examples("heldout", cache)
        for index in range(len(masked)):
            row = masked[index]
            np.add.at(heldout, row["masked_tokens"][row["masked_positions"] > 0], 1)
        return unigram_nats(train, heldout, vocabulary)

    def _given_tokenizer(self) -> Tokenizer | None:
        return load_wordpiece(Path(self.tokenizer).expanduser(), self.vocab_size) if self.tokenizer else None

    def _trained_tokenizer(self, cache: Path, documents: Documents) -> Tokenizer:
        path = self._tokenizer_path(cache, documents)
        if not path.exists():
            texts = stream(self, documents, "train", Rejects(self.max_malformed))
            trained = train_wordpiece(texts, self.vocab_size, lower_case=self.lower_case)
            cache.mkdir(parents=True, exist_ok=True)
            packing.write_atomically(path, trained.to_str(pretty=True))
        return load_wordpiece(path, self.vocab_size)

    def _write(self, directory: Path, documents: Documents, tokenizer: Tokenizer) -> None:
        vocabulary = vocabulary_of(tokenizer)
        totals = {split: self._write_split(directory, split, documents, tokenizer) for split in SPLITS}
        content = digest([totals[split]["content"] for split in SPLITS])
        stamp = {"settings": self._settings(documents), "content": content, "vocabulary": vocabulary._asdict()}
        packing.write_json(directory / "stamp.json", stamp | totals)

    def _write_split(self, directory: Path, split: Split, documents: Documents, tokenizer: Tokenizer) -> dict[str, Any]:
        rejects = Rejects(self.max_malformed)
        progress = packing.Progress(f"pairing {split}", rejects)

        def tokenized() -> Iterator[list[np.ndarray]]:
            for text in stream(self, documents, split, rejects):
                sentences = split_sentences(text)
                with refusing(f"the tokenizer fails on the document {text[:40]!r}...; use another"):
                    encodings = tokenizer.encode_batch_fast(sentences, add_special_tokens=False)
                tokens = [np.array(each.ids, np.int32) for each in encodings if each.ids]
                progress.add(len(text), sum(map(len, tokens)))
                yield tokens

        rng = np.random.default_rng([_PAIRS_SEED, SPLITS.index(split)])

        def paired() -> Iterator[Pair]:
            for group in groups(tokenized(), _GROUP):
                if len(group) < 2:
                    raise UserError(
                        f"data.source {self.source!r} has 1 document to use in its {split} split and needs at least 2, "
                        "because second texts are drawn from other documents; give more"
                    )
                yield from pairs(group, capacity=self.sequence_length - 3, short_rate=self.short_rate, rng=rng)

        count, content = write_pairs(directory / split, paired(), vocabulary_of(tokenizer), self.sequence_length)
        totals = progress.finish(count, self.sequence_length)
        say_skipped(split, rejects)
        return totals | {"content": content}

    def _prepared(self, cache: Path) -> Path:
        rows = self._rows_path(cache, documents_of(self))
        if not rows.exists():
            raise UserError(f"{cache} holds no rows for {self.source} with these settings; call prepare first")
        return rows

    def _vocabulary(self, rows: Path) -> Vocabulary:
        try:
            return Vocabulary(**(read_json(rows / "stamp.json") or {})["vocabulary"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{rows}/stamp.json is damaged; remove {rows}, and it is made again") from error

    def _settings(self, documents: Documents) -> dict[str, Any]:
        """What decides the content of the rows; masks are made when they are read."""
        return self._tokenizer_settings(documents) | {
            "sequence_length": self.sequence_length,
            "short_rate": self.short_rate,
        }

    def _tokenizer_settings(self, documents: Documents) -> dict[str, Any]:
        return {
            "format": _CACHE_FORMAT,
            "source": self.source,
            "fingerprint": documents.fingerprint,
            "vocab_size": self.vocab_size,
            "lower_case": self.lower_case,
            "max_documents": self.max_documents,
            "tokenizer": tokenizer_digest(self.tokenizer),
        }

    def _rows_path(self, cache: Path, documents: Documents) -> Path:
        return cache / f"pairs-{digest(self._settings(documents))}"

    def _tokenizer_path(self, cache: Path, documents: Documents) -> Path:
        return cache / f"wordpiece-{digest(self._tokenizer_settings(documents))}.json"


class MaskedRows:
    """Rows masked in a way that is a function of their number alone."""

    def __init__(self, rows: PairRows, data: MaskedTextData):
        self._rows, self._data = rows, data

    def __repr__(self) -> str:
        return repr(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._data.augment(self._rows[index], np.random.default_rng([_MASKS_SEED, index]))
