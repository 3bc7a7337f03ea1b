"""Text for language models: documents tokenized and packed once into shards of rows, then read by row at random."""

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
from etils import epath

from ...base import paths
from ...base.bounds import Within
from ...dataset import Codec, Split
from ..preparing.manifests import Manifest
from ..preparing.preparing import Tally
from ..reading import shards
from ..reading.sources import Stream
from . import markers, packing
from .documents import DocumentData
from .tokenizer import (
    SMALLEST_VOCABULARY,
    Tokenizer,
    encode,
    load_tokenizer,
    refusing,
    spread,
    token_bytes,
    train_tokenizer,
)


@dataclasses.dataclass(frozen=True)
class TextData(DocumentData):
    """Documents packed into rows of tokens: arrays of `packing.unpacked`, of sequence_length + 1 tokens.

    The cache holds `tokenizer-HASH.json` and `rows-HASH/`, named by a hash of the settings and the source, so that
    other settings or a changed source never use old files.
    """

    version: ClassVar[int] = 5
    packing_knobs: ClassVar[tuple[str, ...]] = ("sequence_length", "begin_token", "end_token")

    sequence_length: Annotated[int, Within(1, 2**24)] = 256  # input tokens per row; a row holds one more, a target
    vocab_size: Annotated[int, Within(SMALLEST_VOCABULARY, 2**24)] = 4096  # tokens: an end, 256 bytes and merges
    tokenizer: str = ""  # tokenizers JSON file, SentencePiece .model or folder with one; "" trains byte-level BPE
    begin_token: int | str = ""  # name or id of the token before a document; "" uses the tokenizer's, or end_token
    end_token: int | str = ""  # name or id of the token that ends a document; "" uses the tokenizer's

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
        path = epath.Path(tokenizer)
        loaded = self.load(path)
        begin, end = self._markers(path)
        weights = token_bytes(loaded, self.vocab_size)

        def counted() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for text, tokens in encode(loaded, records, begin, end):
                size, own = len(text.encode()), weights[tokens]
                own[[0, -1]] = 0
                tally.counts.update(documents=1, bytes=size, tokens=len(tokens) - 1)
                yield tokens, spread(size, own)

        row_type = self._row_type
        return (packing.to_bytes(row, row_type) for row in packing.pack(counted(), self.sequence_length + 1))

    def row_decoder(self, split: Split, folder: epath.Path, manifest: Manifest) -> shards.Decode:
        """See `Preparable.row_decoder`."""
        return functools.partial(packing.unpacked, row_type=self._row_type)

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shape and type of the arrays of a row."""
        shapes = packing.shapes(self.sequence_length + 1)
        return {name: jax.ShapeDtypeStruct(shape, np.int32) for name, shape in shapes.items()}

    def settings(self) -> dict[str, Any]:
        """See `Tokenized.settings`; with the ids of the markers of a given tokenizer."""
        settings = super().settings()
        if self.tokenizer:
            settings["begin_token"], settings["end_token"] = self._markers(self.tokenizer_file)
        return settings

    def _markers(self, path: epath.Path) -> markers.Markers:
        return markers.find(path, self.load(path), self.begin_token, self.end_token)

    def codec(self, cache: str | os.PathLike[str]) -> Codec:
        """See `dataset.codec`."""
        tokenizer = self.load_tokenizer(cache)
        path = self.tokenizer_file if self.tokenizer else paths.of(cache) / "tokenizer.json"
        begin, end = markers.find(path, tokenizer, self.begin_token, self.end_token)

        def encoded(text: str) -> list[int]:
            with refusing(f"the tokenizer fails on {text[:40]!r}"):
                return [begin, *tokenizer.encode(text, add_special_tokens=False).ids]

        return Codec(encoded, lambda tokens: tokenizer.decode([*tokens]), (end,))

    @property
    def _row_type(self) -> np.dtype:
        return packing.row_type(self.sequence_length + 1, self.vocab_size)
