"""Text for a language model: documents, tokenized and packed once into shards of rows, then read by row at random."""

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import numpy as np
from etils import epath

from ...base.errors import UserError
from ...dataset import Split
from ..preparing import manifests
from ..preparing.jobs import Ingredients, Tally
from ..preparing.streams import Stream
from ..reading.shards import ShardRows
from . import packing
from .document_knobs import check_knobs, documents_of, split_settings
from .documents import Documents
from .tokenized import Tokenized
from .tokenizer import SMALLEST_VOCABULARY, Tokenizer, characters_per_token, encode, load_tokenizer, train_tokenizer

# Part of every cache name: raise it when the meaning of cached files changes.
_CACHE_FORMAT = 3


@dataclasses.dataclass(frozen=True)
class TextData(Tokenized):
    """Documents from a vendored sample, local files or a prepared tfds set, packed into rows.

    The cache holds `tokenizer-HASH.json` and `rows-HASH/`, named by a hash of the settings and of the source, so that
    other settings or a changed source never meet old files.
    """

    noun: ClassVar[str] = "documents"
    row_settings: ClassVar[tuple[str, ...]] = ("sequence_length",)

    source: str = "sample:enwiki"  # or "tfds:lm1b:1.1.0", "tfds:c4/en:3.1.0", "file:/path/*.txt", "file:/path/*.tsv.xz"
    sequence_length: int = 256  # inputs per row; a row holds one token more, the last target
    vocab_size: int = 4096  # tokens, the end of a document and the 256 bytes included
    data_dir: str = ""  # where tfds sets lie, local or gs://; "" is $TFDS_DATA_DIR or ~/tensorflow_datasets
    text_key: str = "text"  # feature of a tfds set that holds the document
    tsv_column: int = 1  # of a .tsv file, the column that holds the document; the first is 1
    train_split: str = "train"  # tfds split to train on
    heldout_split: str = "validation"  # tfds split to evaluate on ("test" for lm1b); samples and files use every 10th
    tokenizer: str = ""  # tokenizers JSON file, byte-level BPE, local or gs://; "" trains one on the training documents
    max_documents: int = 0  # per split, malformed ones included, also for training the tokenizer; 0 takes all

    def __post_init__(self):
        super().__post_init__()
        check_knobs(self)
        if self.sequence_length < 1:
            raise ValueError(f"data.sequence_length is {self.sequence_length}; it must be at least 1")
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(f"data.vocab_size is {self.vocab_size}; bytes alone need {SMALLEST_VOCABULARY}")

    @property
    def tokens_per_example(self) -> int:
        """Inputs, and as many targets, in one row."""
        return self.sequence_length

    @property
    def limit(self) -> int:
        """See `Tokenized.limit`."""
        return self.max_documents

    def open_source(self) -> Documents:
        """See `Preparable.open_source`."""
        return documents_of(self)

    def settings(self) -> dict[str, Any]:
        """See `Preparable.settings`; `max_malformed` only decides whether there are any rows."""
        return {
            "format": _CACHE_FORMAT,
            "source": self.source,
            "sequence_length": self.sequence_length,
            "vocab_size": self.vocab_size,
            "max_documents": self.max_documents,
            "tokenizer": self.tokenizer_digest(),
            "shard_size": self.shard_size,
        } | split_settings(self)

    def load(self, path: epath.Path) -> Tokenizer:
        """See `Tokenized.load`."""
        return load_tokenizer(path, self.vocab_size)

    def train(self, records: Iterator[str]) -> Tokenizer:
        """See `Tokenized.train`."""
        return train_tokenizer(records, self.vocab_size)

    def tools(self, ingredients: Ingredients) -> tuple[Tokenizer, np.ndarray]:
        """The tokenizer, and how many characters begin in each token."""
        tokenizer = self.load(epath.Path(ingredients.tokenizer))
        return tokenizer, characters_per_token(tokenizer, self.vocab_size)

    def rows(
        self, stream: Stream, number: int, records: Iterator[str], tools: tuple[Tokenizer, np.ndarray], tally: Tally
    ) -> Iterator[bytes]:
        """See `Preparable.rows`; the last row of a shard is filled up with padding."""
        tokenizer, characters = tools

        def counted() -> Iterator[np.ndarray]:
            for text, tokens in encode(tokenizer, records):
                if characters[tokens].sum() != len(text):
                    raise UserError(
                        f"tokenizer {self.tokenizer} turns {len(text)} characters into {characters[tokens].sum()} "
                        f"({text[:40]!r}...); use a byte-level tokenizer"
                    )
                tally.counts.update(documents=1, characters=len(text), tokens=len(tokens) - 1)
                yield tokens

        row_type = packing.row_type(self.sequence_length + 1, self.vocab_size)
        return (packing.to_bytes(row, row_type) for row in packing.pack(counted(), self.sequence_length + 1))

    def examples(self, split: Split, cache: str | os.PathLike[str]) -> ShardRows:
        """The rows of a split: random access, picklable, arrays int32 [sequence_length + 1] by `packing.COLUMNS`.

        Raises:
          UserError: nothing is prepared for these settings in `cache`.
        """
        folder, manifest = self.manifest(cache)
        tokenizer = self.tools(Ingredients(os.fspath(self.tokenizer_of(folder, manifest))))
        row_type = packing.row_type(self.sequence_length + 1, self.vocab_size)
        decode = functools.partial(packing.unpacked, row_type=row_type, characters=tokenizer[1])
        return ShardRows(*manifests.of_split(folder, manifest, split), decode)

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of a row's arrays."""
        return {name: jax.ShapeDtypeStruct((self.sequence_length + 1,), np.int32) for name in packing.COLUMNS}
