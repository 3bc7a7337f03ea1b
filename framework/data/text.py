"""Text for a language model: documents, tokenized and packed once into the cache, then read by row at random."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..errors import UserError
from . import packing
from .documents import Documents
from .records import Rejects
from .rows import are_there, check_knobs, digest, documents_of, read_stamp, say_skipped, stream, tokenizer_digest
from .splits import SPLITS, Split
from .tokenizer import (
    SMALLEST_VOCABULARY,
    Tokenizer,
    characters_per_token,
    encode,
    load_tokenizer,
    train_tokenizer,
)

# Part of every cache name: raise it when the meaning of cached files changes.
_CACHE_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class TextData:
    """Documents from a vendored sample, local files or a prepared tfds set, packed into rows.

    The cache holds `tokenizer-HASH.json` and `rows-HASH/`, named by a hash of the settings and of the source, so that
    other settings or a changed source never meet old files.
    """

    source: str = "sample:enwiki"  # or "tfds:lm1b:1.1.0", "tfds:c4/en:3.1.0", "file:/path/*.txt", "file:/path/*.tsv.xz"
    sequence_length: int = 256  # inputs per row; a row holds one token more, the last target
    vocab_size: int = 4096  # tokens, the end of a document and the 256 bytes included
    data_dir: str = ""  # where tfds sets lie, local or gs://; "" is $TFDS_DATA_DIR or ~/tensorflow_datasets
    text_key: str = "text"  # feature of a tfds set that holds the document
    tsv_column: int = 1  # of a .tsv file, the column that holds the document; the first is 1
    train_split: str = "train"  # tfds split to train on
    heldout_split: str = "validation"  # tfds split to evaluate on ("test" for lm1b); samples and files use every 10th
    tokenizer: str = ""  # tokenizers JSON file, byte-level BPE; "" trains one on the training documents
    max_documents: int = 0  # per split, for packing and for training the tokenizer; 0 takes all
    max_malformed: int = 0  # documents of a split that may be skipped; 0, so that nobody's data shrink unasked

    def __post_init__(self):
        check_knobs(self)
        if self.sequence_length < 1:
            raise ValueError(f"data.sequence_length is {self.sequence_length}; it must be at least 1")
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(f"data.vocab_size is {self.vocab_size}; bytes alone need {SMALLEST_VOCABULARY}")

    @property
    def tokens_per_example(self) -> int:
        """Inputs, and as many targets, in one row."""
        return self.sequence_length

    def prepare(self, cache: Path) -> None:
        """Train the tokenizer and pack both splits into `cache`, unless they are there already.

        For one process, before any other reads. Streams the source; a failure leaves no partial rows behind. Malformed
        documents are skipped; how many, and the first few, is said on stderr, also where the rows are there already.

        Raises:
          UserError: the source or the tokenizer file cannot be used, and nothing has been written; or a split has more
            than `max_malformed` malformed documents.
        """
        documents = documents_of(self)
        rows = self._rows_path(cache, documents)
        if are_there(rows, self.max_malformed):
            return
        tokenizer = self._given_tokenizer() or self._trained_tokenizer(cache, documents)
        with packing.AtomicDirectory(rows) as partial:
            characters = characters_per_token(tokenizer, self.vocab_size)
            np.save(partial / "characters.npy", characters)
            totals = {split: self._pack_split(partial, split, documents, tokenizer, characters) for split in SPLITS}
            table = hashlib.sha256(characters.tobytes()).hexdigest()
            content = digest([table, *(totals[split]["content"] for split in SPLITS)])
            stamp = {"settings": self._settings(documents), "content": content}
            packing.write_json(partial / "stamp.json", stamp | totals)

    def examples(self, split: Split, cache: Path) -> packing.PackedRows:
        """The rows of a split that `prepare` has packed: random access, picklable, arrays int32 [sequence_length + 1].

        Raises:
          UserError: nothing is prepared for these settings in `cache`.
        """
        rows = self._prepared(cache)
        return packing.PackedRows(rows / split, rows / "characters.npy")

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of a row's arrays."""
        return {name: jax.ShapeDtypeStruct((self.sequence_length + 1,), np.int32) for name in packing.COLUMNS}

    def fingerprint(self, cache: Path) -> str:
        """Hash of the content of both splits' rows: files that were copied, touched or packed anew do not change it.

        Raises:
          UserError: nothing is prepared for these settings in `cache`.
        """
        return read_stamp(self._prepared(cache), self.max_malformed)[0]

    def load_tokenizer(self, cache: Path) -> Tokenizer:
        """The tokenizer that the rows were made with, for decoding."""
        return self._given_tokenizer() or load_tokenizer(
            self._tokenizer_path(cache, documents_of(self)), self.vocab_size
        )

    def _given_tokenizer(self) -> Tokenizer | None:
        return load_tokenizer(Path(self.tokenizer).expanduser(), self.vocab_size) if self.tokenizer else None

    def _trained_tokenizer(self, cache: Path, documents: Documents) -> Tokenizer:
        path = self._tokenizer_path(cache, documents)
        if not path.exists():
            texts = stream(self, documents, "train", Rejects(self.max_malformed))
            trained = train_tokenizer(texts, self.vocab_size)
            cache.mkdir(parents=True, exist_ok=True)
            packing.write_atomically(path, trained.to_str(pretty=True))
        return load_tokenizer(path, self.vocab_size)

    def _pack_split(
        self, directory: Path, split: Split, documents: Documents, tokenizer: Tokenizer, characters: np.ndarray
    ) -> dict[str, Any]:
        rejects = Rejects(self.max_malformed)
        progress = packing.Progress(f"packing {split}", rejects)

        def counted() -> Iterator[np.ndarray]:
            for text, tokens in encode(tokenizer, stream(self, documents, split, rejects)):
                if characters[tokens].sum() != len(text):
                    raise UserError(
                        f"tokenizer {self.tokenizer} turns {len(text)} characters into {characters[tokens].sum()} "
                        f"({text[:40]!r}...); use a byte-level tokenizer"
                    )
                progress.add(len(text), len(tokens) - 1)
                yield tokens

        row_length = self.sequence_length + 1
        rows = packing.pack(counted(), row_length)
        count, content = packing.write_rows(directory / split, rows, row_length, self.vocab_size)
        totals = progress.finish(count, row_length)
        say_skipped(split, rejects)
        return totals | {"content": content}

    def _prepared(self, cache: Path) -> Path:
        rows = self._rows_path(cache, documents_of(self))
        if not rows.exists():
            raise UserError(f"{cache} holds no rows for {self.source} with these settings; call prepare first")
        return rows

    def _settings(self, documents: Documents) -> dict[str, str | int]:
        """What decides the content of the rows; `max_malformed` only decides whether there are any."""
        return {
            "format": _CACHE_FORMAT,
            "source": self.source,
            "fingerprint": documents.fingerprint,
            "sequence_length": self.sequence_length,
            "vocab_size": self.vocab_size,
            "max_documents": self.max_documents,
            "tokenizer": tokenizer_digest(self.tokenizer),
        }

    def _rows_path(self, cache: Path, documents: Documents) -> Path:
        return cache / f"rows-{digest(self._settings(documents))}"

    def _tokenizer_path(self, cache: Path, documents: Documents) -> Path:
        settings = {name: value for name, value in self._settings(documents).items() if name != "sequence_length"}
        return cache / f"tokenizer-{digest(settings)}.json"
