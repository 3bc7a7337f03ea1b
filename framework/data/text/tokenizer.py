"""Byte-level byte-pair encoding: any text encodes, decodes to itself, and its characters are counted exactly.

Training is deterministic: the same documents give the same JSON for any number of threads or processes.
"""

import contextlib
import functools
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from etils import epath

# The Rust library starts threads. Set explicitly, because it warns at every fork otherwise.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ...base.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end of a document
# Merges settle long before this; reading all of a web-sized set would only cost hours.
TRAINING_CHARACTERS = 300_000_000
_BYTE_LEVEL_PARTS = ("ByteLevel", "Split", "Digits", "Punctuation")
_PROBE = " a  b\r\n\tÉe\u0301ﬁ \uff21\u00a0漢字 👩‍🚀 1,000 <|endoftext|>"
_LONGEST_WORD = 1_000  # characters
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{_LONGEST_WORD},}}|(?<!\s)\s{{{_LONGEST_WORD},}}")
_CHUNK = 1_000_000  # characters encoded at once


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer of at most `vocab_size` tokens: id 0 ends a document, the 256 bytes follow, then the merges.

    It has fewer tokens if no further pair occurs twice. Reads at most 300 M characters.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    train_on(tokenizer, documents, trainer)
    # The text of the end token inside a document is ordinary text.
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: epath.Path, vocab_size: int) -> Tokenizer:
    """Read a tokenizers JSON file of byte-level BPE that preserves text.

    Raises:
      UserError: the file is missing or invalid, has more than `vocab_size` tokens, has no "<|endoftext|>", or is not
        byte-level (decoding does not restore the text).
    """
    return _byte_level(path, vocab_size, read_bytes(path))


@functools.lru_cache(1)  # for a large vocabulary it takes a second, and a run asks for it several times
def _byte_level(path: epath.Path, vocab_size: int, content: bytes) -> Tokenizer:
    _refuse_unfit_parts(path, content)
    tokenizer = read_tokenizer(path, vocab_size, content)
    if tokenizer.token_to_id(END_OF_DOCUMENT) is None:
        raise UserError(f"data.tokenizer={path}: has no token {END_OF_DOCUMENT!r}. Add it as a special token.")
    with refusing(f"data.tokenizer={path}: fails on {_PROBE!r}"):
        ids = tokenizer.encode(_PROBE, add_special_tokens=False).ids
        text = tokenizer.decode(ids, skip_special_tokens=False)
    counted = characters_per_token(tokenizer, vocab_size)[ids].sum()
    foreign = set(ids) - set(_byte_level_ids(tokenizer))
    dropout = getattr(tokenizer.model, "dropout", None)
    if text != _PROBE or counted != len(_PROBE) or foreign or dropout:
        raise UserError(
            f"data.tokenizer={path}: does not preserve text, so bits per character would be wrong (it turns {_PROBE!r} "
            f"into {text!r}, with dropout {dropout}). Use a byte-level BPE tokenizer without normalizer, dropout or "
            "prefix space."
        )
    return tokenizer


def _refuse_unfit_parts(path: epath.Path, content: bytes) -> None:
    """Refuse parts that no byte-level tokenizer has; the Rust library panics on some, which writes to the terminal."""

    def fits(part: Any) -> bool:
        if part is None or part["type"] in _BYTE_LEVEL_PARTS:
            return True
        return part["type"] == "Sequence" and all(map(fits, part.get("normalizers", part.get("pretokenizers"))))

    with refusing(f"data.tokenizer={path}: is not a tokenizers JSON file"):
        parts = json.loads(content)
        unfit = [name for name in ("normalizer", "pre_tokenizer") if not fits(parts.get(name))]
    if unfit:
        raise UserError(
            f"data.tokenizer={path}: does not preserve text, so bits per character would be wrong (it has another "
            f"{' and '.join(unfit)}). Use a byte-level BPE tokenizer without normalizer, dropout or prefix space."
        )


def read_tokenizer(path: epath.Path, vocab_size: int, content: bytes) -> Tokenizer:
    """Return the tokenizer of the content of a tokenizers JSON file.

    Raises:
      UserError: it is invalid, or has more than `vocab_size` tokens.
    """
    with refusing(f"data.tokenizer={path}: is not a tokenizers JSON file"):
        tokenizer = Tokenizer.from_buffer(content)
        size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > vocab_size:
        raise UserError(f"data.vocab_size={vocab_size}: {path} has {size} tokens. Set data.vocab_size={size}.")
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_bytes(path: epath.Path) -> bytes:
    """Return the content of a tokenizer's file.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"data.tokenizer={path}: cannot be read ({error.strerror or error}). Check the path."
        ) from error


@contextlib.contextmanager
def refusing(message: str) -> Iterator[None]:
    """Turn any error of the tokenizers library into a UserError.

    The Rust library raises plain Exception and, when it panics, a BaseException of a class without a public name.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{message}: {error}") from error


def encode(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each document with its token ids, int32 [tokens], between two end tokens.

    The first end token is the input from which the first real token is predicted.

    Raises:
      UserError: the tokenizer fails on a document.
    """
    end = np.array([tokenizer.token_to_id(END_OF_DOCUMENT)], np.int32)
    for chunk in _chunks(documents):
        with refusing(f"the tokenizer fails on one of the documents from {chunk[0][:40]!r} on; use another"):
            encodings = tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
        for document, encoding in zip(chunk, encodings, strict=True):
            yield document, np.concatenate([end, np.array(encoding.ids, np.int32), end])


@functools.lru_cache(1)
def characters_per_token(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """Return the number of characters that begin in each token, int32 [vocab_size].

    These are the bytes of a token that do not continue a UTF-8 character. Summed over the tokens of a text they give
    its length, even if some tokens hold part of a character.
    """
    table = np.zeros(vocab_size, np.int32)
    for id, token in _byte_level_ids(tokenizer).items():
        table[id] = sum((_BYTES[character] & 0xC0) != 0x80 for character in token)
    for id, added in tokenizer.get_added_tokens_decoder().items():
        table[id] = 0 if added.special else len(added.content)
    table.setflags(write=False)
    return table


def _byte_level_ids(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the tokens spelt in the byte-level alphabet and those added later as literal text."""
    special = {id for id, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    return {
        id: token
        for token, id in tokenizer.get_vocab(with_added_tokens=False).items()
        if id not in special and all(character in _BYTES for character in token)
    }


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 characters stand for themselves, other bytes begin at U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def train_on(tokenizer: Tokenizer, documents: Iterable[str], trainer: Any) -> None:
    """Train a tokenizer on the first 300 M characters of documents, in whole documents, until a signal interrupts.

    Training takes time that is quadratic in the longest word, so longer runs of letters or of white space are cut. The
    library does not look for signals, so it works in a thread of its own.
    """
    ended, trained = threading.Event(), Future[None]()

    def texts() -> Iterator[str]:
        for document in first_characters(documents):
            start = 0
            for run in _LONG_RUN.finditer(document):
                for end in range(run.start() + _LONGEST_WORD, run.end(), _LONGEST_WORD):
                    yield document[start:end]
                    start = end
            yield document[start:]
            if ended.is_set():
                raise InterruptedError

    def work() -> None:
        try:
            trained.set_result(tokenizer.train_from_iterator(texts(), trainer))
        except BaseException as error:
            trained.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
        trained.result()
    finally:
        ended.set()
        if thread.is_alive():
            thread.join(1)


def first_characters(documents: Iterable[str]) -> Iterator[str]:
    """Yield whole documents until `TRAINING_CHARACTERS` are read."""
    read = 0
    for document in documents:
        if read >= TRAINING_CHARACTERS:
            return
        read += len(document)
        yield document


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
