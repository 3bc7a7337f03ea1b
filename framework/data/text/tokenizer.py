"""Tokenizers: byte-level byte-pair encoding, trained here, or any that is given as a file; documents as their tokens.

Training is deterministic: the same documents give the same JSON for any number of threads or processes.
"""

import contextlib
import functools
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
from .spm import SentencePiece

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end of a document
# Merges settle long before this; reading all of a web-sized set would only cost hours.
TRAINING_CHARACTERS = 300_000_000
_LONGEST_WORD = 1_000  # characters
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{_LONGEST_WORD},}}|(?<!\s)\s{{{_LONGEST_WORD},}}")
_CHUNK = 1_000_000  # characters encoded at once
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of one byte, of tokenizers that fall back to bytes


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


def load_tokenizer(path: epath.Path, vocab_size: int) -> Any:
    """Read a tokenizers JSON file, or a SentencePiece model, which has the methods of a Tokenizer that are used here.

    Text that spells a special token is ordinary text, except if it is a piece of a Unigram model in JSON.

    Raises:
      UserError: the file is missing or invalid, has more than `vocab_size` tokens, or its tokens are drawn at random.
    """
    return _loaded(path, vocab_size, read_bytes(path))


@functools.lru_cache(1)  # for a large vocabulary it takes a second, and a run asks for it several times
def _loaded(path: epath.Path, vocab_size: int, content: bytes) -> Any:
    is_model = path.suffix == ".model"
    with refusing(f"data.tokenizer={path}: is not a {'SentencePiece model' if is_model else 'tokenizers JSON file'}"):
        tokenizer: Any = SentencePiece(content) if is_model else Tokenizer.from_buffer(content)
        size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > vocab_size:
        raise UserError(f"data.vocab_size={vocab_size}: {path} has {size} tokens. Set data.vocab_size={size}.")
    if not is_model:
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if dropout := getattr(tokenizer.model, "dropout", None):
            raise UserError(f"data.tokenizer={path}: has dropout {dropout}, so tokens are random. Set it to null.")
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


def encode(tokenizer: Any, documents: Iterable[str], begin: int, end: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each document with its token ids, int32 [tokens], between the tokens `begin` and `end`.

    The first is the input from which the first real token is predicted.

    Raises:
      UserError: the tokenizer fails on a document.
    """
    for chunk in _chunks(documents):
        with refusing(f"the tokenizer fails on one of the documents from {chunk[0][:40]!r} on; use another"):
            encodings = tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
        for document, encoding in zip(chunk, encodings, strict=True):
            yield document, np.array([begin, *encoding.ids, end], np.int32)


@functools.lru_cache(1)
def token_bytes(tokenizer: Any, vocab_size: int) -> np.ndarray:
    """Return the number of bytes of text that each token stands for, int64 [vocab_size].

    It is exact for tokens of byte-level tokenizers, and about right for others, which may change the text. Special
    tokens count as one byte, for the unknown one.
    """
    parts = f"{tokenizer.pre_tokenizer!r}{tokenizer.normalizer!r}{tokenizer.decoder!r}"
    byte_level, table = "ByteLevel(" in parts, np.zeros(vocab_size, np.int64)
    for token, id in tokenizer.get_vocab(with_added_tokens=False).items():
        if byte_level:
            table[id] = len(token)  # GPT-2's alphabet has a character for each byte
        elif _BYTE.fullmatch(token):
            table[id] = 1
        else:
            table[id] = len(token.removeprefix("##").replace("▁", " ").encode())
    for id, added in tokenizer.get_added_tokens_decoder().items():
        table[id] = 1 if added.special else len(added.content.encode())
    table.setflags(write=False)
    return table


def spread(count: int, weights: np.ndarray) -> np.ndarray:
    """Return `count` bytes of a document divided over its tokens in proportion to weights [tokens], int64 [tokens].

    The sum is `count`; without any weight the last token has all.
    """
    ends = np.cumsum(weights)
    if not ends[-1]:
        return np.where(np.arange(len(weights)) == len(weights) - 1, count, 0)
    return np.diff(ends * count // ends[-1], prepend=0)


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
