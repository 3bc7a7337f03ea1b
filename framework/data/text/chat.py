"""Conversations for fine-tuning, packed into rows; only what the assistant says is trained on."""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from etils import epath

from ...base import paths
from ...dataset import Codec, Example, Split
from .. import samples
from ..preparing.manifests import Manifest
from ..preparing.preparing import Tally
from ..reading import fields, shards
from ..reading.malformed import Malformed
from ..reading.sources import Stream
from . import markers, packing, templates
from .templates import ROLES, TEMPLATES, Message
from .text import TextData
from .tokenizer import Tokenizer, refusing, train_tokenizer

_TOO_LONG = "longer than a row"
Conversation = tuple[Message, ...]


def _text(conversation: Conversation) -> str:
    return "\n".join(message.content for message in conversation)


@dataclasses.dataclass(frozen=True)
class ChatData(TextData):
    """Conversations packed into rows: the arrays of `TextData`, and `counted`, 1 for tokens that are trained on.

    A record is {"messages": [{"role": ..., "content": ...}, ...]} with the roles system, user and assistant, or
    {"prompt": ..., "completion": ...}. Rows hold whole conversations; one that is longer than a row is dropped.
    """

    noun: ClassVar[str] = "conversations"
    version: ClassVar[int] = 1
    packing_knobs: ClassVar[tuple[str, ...]] = (*TextData.packing_knobs, "template")
    sample_file: ClassVar[str] = "sums-1000.jsonl.xz"
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".json")
    text_of: ClassVar[Any] = staticmethod(_text)

    source: str = "sample:sums"  # or "file:/path/*.jsonl", "file:/path/*.json.gz"
    text_key: str = "messages"  # field with the messages of a record that has no "prompt" and "completion"
    template: str = "auto"  # markup: llama3, chatml, gemma, plain (none), or auto, the first whose tokens are known

    def __post_init__(self):
        super().__post_init__()
        if self.template not in (*TEMPLATES, "auto"):
            raise ValueError(f"data.template={self.template!r}: use one of {', '.join(TEMPLATES)} or auto")
        if self.source.startswith("tfds:"):
            raise ValueError(f"data.source={self.source!r}: conversations are read from file:/path/*.jsonl")

    def sample(self, split: Split) -> Iterator[Conversation]:
        """Yield the vendored conversations of a split: every tenth is held out."""
        for number, line in enumerate(samples.read(self.sample_file).splitlines()):
            if (number % 10 == 9) == (split == "heldout"):
                conversation = self._conversation(json.loads(line))
                assert not isinstance(conversation, str)
                yield conversation

    def read(self, path: epath.Path) -> Iterator[Conversation | Malformed]:
        """Yield the conversations of a file."""
        for number, record in enumerate(fields.objects(path), start=1):
            found = record if isinstance(record, Malformed) else self._conversation(record)
            yield Malformed(f"{path}, record {number}", found) if isinstance(found, str) else found

    def cut(self, path: epath.Path, size: int) -> Iterator[Conversation | Malformed]:
        """See `Tokenized.cut`."""
        return self.read(path)

    def _conversation(self, record: dict[str, Any]) -> Conversation | str:
        """Return the conversation of a record, or the reason why it has none."""
        if {"prompt", "completion"} <= record.keys():
            said = [{"role": "user", "content": record["prompt"]}]
            said += [{"role": "assistant", "content": record["completion"]}]
        else:
            said = record.get(self.text_key)
        if not isinstance(said, list) or not all(isinstance(message, dict) for message in said):
            return f'has neither {self.text_key!r}, a list of objects, nor "prompt" and "completion"'
        found = []
        for message in said:
            role, content = message.get("role"), message.get("content")
            if role not in ROLES or not isinstance(content, str):
                return f"has a message with the role {role!r} and content that is a {type(content).__name__}"
            if not content.isascii() and any(0xD800 <= ord(character) < 0xE000 for character in content):
                return "has half of a surrogate pair, which no UTF-8 has"
            found.append(Message(role, content))
        if not any(message.role == "assistant" and message.content for message in found):
            return "has no answer of the assistant"
        return tuple(found)

    def train(self, records: Iterator[Any]) -> Tokenizer:
        """See `Tokenized.train`."""
        return train_tokenizer(map(_text, records), self.vocab_size)

    def rows(
        self, stream: Stream, number: int, records: Iterator[Any], tokenizer: str, tally: Tally
    ) -> Iterator[bytes]:
        """See `Preparable.rows`."""
        path, length = epath.Path(tokenizer), self.sequence_length + 1
        loaded = self.load(path)
        template, ids = templates.choose(self.template, loaded, self._markers(path))
        row, used, number = np.zeros((), self._row_type), 0, 0
        for conversation in records:
            pieces = [*template.pieces(conversation)]
            texts = [piece.text for piece in pieces if not piece.special]
            with refusing(f"the tokenizer fails on {texts[0][:40]!r}; use another"):
                encoded = iter(loaded.encode_batch_fast(texts, add_special_tokens=False))
            parts = [[ids[piece.text]] if piece.special else next(encoded).ids for piece in pieces]
            tokens = np.concatenate([np.asarray(part, np.int32) for part in parts])
            counted = np.repeat([piece.trained for piece in pieces], [len(part) for part in parts])
            size = sum(len(message.content.encode()) for message in conversation if message.role == "assistant")
            if len(tokens) > length:
                tally.dropped[_TOO_LONG] += 1
                continue
            tally.counts.update(conversations=1, tokens=len(tokens) - 1, trained_tokens=int(counted[1:].sum()))
            if used + len(tokens) > length:
                yield row.tobytes()
                row, used, number = np.zeros((), self._row_type), 0, 0
            place, number = slice(used, used + len(tokens)), number + 1
            row["tokens"][place], row["counted"][place], row["segments"][place] = tokens, counted, number
            row["bytes"] += size
            used += len(tokens)
        if used:
            yield row.tobytes()

    def codec(self, cache: str | os.PathLike[str]) -> Codec:
        """See `dataset.codec`; a text becomes the message of a user, up to the answer."""
        tokenizer = self.load_tokenizer(cache)
        path = self.tokenizer_file if self.tokenizer else paths.of(cache) / "tokenizer.json"
        template, ids = templates.choose(
            self.template, tokenizer, markers.find(path, tokenizer, self.begin_token, self.end_token)
        )

        def encoded(text: str) -> list[int]:
            pieces = template.pieces([Message("user", text), Message("assistant", "")])
            tokens: list[int] = []
            for piece in itertools.takewhile(lambda piece: not piece.trained, pieces):
                if piece.special:
                    tokens.append(ids[piece.text])
                    continue
                with refusing(f"the tokenizer fails on {text[:40]!r}"):
                    tokens += tokenizer.encode(piece.text, add_special_tokens=False).ids
            return tokens

        return Codec(encoded, lambda tokens: tokenizer.decode([*tokens]), (ids[template.end],))

    def row_decoder(self, split: Split, folder: epath.Path, manifest: Manifest) -> shards.Decode:
        """See `Preparable.row_decoder`."""
        return functools.partial(_unpacked, row_type=self._row_type)

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shape and type of the arrays of a row."""
        found = super().spec()
        return found | {"counted": found["tokens"]}

    @property
    def _row_type(self) -> np.dtype:
        fields = packing.row_type(self.sequence_length + 1, self.vocab_size).descr
        return np.dtype([*fields, ("counted", np.uint8, self.sequence_length + 1)])


def _unpacked(contents: Sequence[bytes], row_type: np.dtype) -> list[Example]:
    """Return the examples of rows: those of `packing.unpacked`, with `counted`."""
    rows = packing.unpacked(contents, row_type)
    counted = np.frombuffer(b"".join(contents), row_type)["counted"].astype(np.int32)
    return [row | {"counted": each} for row, each in zip(rows, counted, strict=True)]
