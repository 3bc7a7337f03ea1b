"""Text for language models: documents tokenized and packed once into shards of rows, then read by row at random."""

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
from etils import epath

from ...base.bounds import Within
from ...base.errors import UserError
from ...dataset import Codec, Split
from ..preparing.manifests import Manifest
from ..preparing.preparing import Tally
from ..reading import shards
from ..reading.sources import Stream
from . import packing
from .documents import DocumentData
from .tokenizer import (
    END_OF_DOCUMENT,
    SMALLEST_VOCABULARY,
    Tokenizer,
    characters_per_token,
    encode,
    load_tokenizer,
    refusing,
    train_tokenizer,
)


@dataclasses.dataclass(frozen=True)
class TextData(DocumentData):
    """Documents packed into rows of tokens, arrays int32 [sequence_length + 1] by `packing.COLUMNS`.

    The cache holds `tokenizer-HASH.json` and `rows-HASH/`, named by a hash of the settings and the source, so that
    other settings or a changed source never use old files.
    """

    version: ClassVar[int] = 4
    packing_knobs: ClassVar[tuple[str, ...]] = ("sequence_length",)

    sequence_length: Annotated[int, Within(1, 2**24)] = 256  # input tokens per row; a row holds one more, a target
    vocab_size: Annotated[int, Within(SMALLEST_VOCABULARY, 2**24)] = 4096  # tokens: an end, 256 bytes and merges
    tokenizer: str = ""  # tokenizers JSON file, byte-level BPE, local or gs://; "" trains one on the training documents

    @property
    def tokens_per_example(self) -> int:
        """Inputs, and as many targets, of one row."""
        return self.sequence_length

    def load(self, path: epath.Path) -> Tokenizer:
        """See `Tokenized.load`."""
        return load_tokenizer(path, self.vocab_size)

    def train(self, records: Iterator[str]) -> Tokenizer:
        """See `Tokenized.train`."""
        return train_tokenizer(records, self.vocab_size)

    def rows(
        self, stream: Stream, number: int, records: Iterator[str], tokenizer: str, tally: Tally
    ) -> Iterator[bytes]:
        """See `Preparable.rows`; the last row of a shard is padded."""
        loaded = self.load(epath.Path(tokenizer))
        characters = characters_per_token(loaded, self.vocab_size)

        def counted() -> Iterator[np.ndarray]:
            for text, tokens in encode(loaded, records):
                if characters[tokens].sum() != len(text):
                    raise UserError(
                        f"data.tokenizer={self.tokenizer}: turns {len(text)} characters into "
                        f"{characters[tokens].sum()} ({text[:40]!r}...). Use a byte-level tokenizer."
                    )
                tally.counts.update(documents=1, characters=len(text), tokens=len(tokens) - 1)
                yield tokens

        row_type = self._row_type
        return (packing.to_bytes(row, row_type) for row in packing.pack(counted(), self.sequence_length + 1))

    def row_decoder(self, split: Split, folder: epath.Path, manifest: Manifest) -> shards.Decode:
        """See `Preparable.row_decoder`."""
        characters = characters_per_token(self.tokenizer_of(folder, manifest), self.vocab_size)
        return functools.partial(packing.unpacked, row_type=self._row_type, characters=characters)

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shape and type of the arrays of a row."""
        return {name: jax.ShapeDtypeStruct((self.sequence_length + 1,), np.int32) for name in packing.COLUMNS}

    def codec(self, cache: str | os.PathLike[str]) -> Codec:
        """See `dataset.codec`."""
        tokenizer = self.load_tokenizer(cache)
        end: Any = tokenizer.token_to_id(END_OF_DOCUMENT)  # `load_tokenizer` has found it

        def encoded(text: str) -> list[int]:
            with refusing(f"the tokenizer fails on {text[:40]!r}"):
                return [end, *tokenizer.encode(text, add_special_tokens=False).ids]

        return Codec(encoded, lambda tokens: tokenizer.decode([*tokens]), (end,))

    @property
    def _row_type(self) -> np.dtype:
        return packing.row_type(self.sequence_length + 1, self.vocab_size)
