"""Byte-level byte-pair encoding: any text encodes, decodes to itself, and its characters are counted exactly.

Training is deterministic: the same documents give the same JSON, whatever the number of threads or processes.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

# The Rust side starts threads of its own; said explicitly, because it warns at every fork when left to guess.
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


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens; id 0 ends a document, the 256 bytes follow, then the merges.

    Fewer tokens come out where the text runs out of pairs that occur twice. Reads 300 M characters at most.
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
    tokenizer.train_from_iterator(first_characters(documents, TRAINING_CHARACTERS), trainer)
    # A document may contain the text of the end token; it is ordinary text there.
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: epath.Path, vocab_size: int) -> Tokenizer:
    """Read a tokenizers JSON file and check that it can serve: it fits, ends documents, and keeps text as it is.

    Raises:
      UserError: the file is missing or no tokenizer, has more than `vocab_size` tokens, has no "<|endoftext|>",
        or is not byte-level (decoding does not give the text back).
    """
    try:
        content = path.read_text("utf-8")
    except OSError as error:
        raise UserError(f"data.tokenizer {path} cannot be read ({error.strerror or error}); check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data.tokenizer {path} is not a tokenizers JSON file: {error}") from error
    _refuse_unfit_parts(path, content)
    with refusing(f"data.tokenizer {path} is not a tokenizers JSON file"):
        tokenizer = Tokenizer.from_str(content)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > vocab_size:
        raise UserError(f"data.tokenizer {path} has {size} tokens, data.vocab_size is {vocab_size}; set it to {size}")
    if tokenizer.token_to_id(END_OF_DOCUMENT) is None:
        raise UserError(f"data.tokenizer {path} has no token {END_OF_DOCUMENT!r}; add it as a special token")
    with refusing(f"data.tokenizer {path} fails on {_PROBE!r}"):
        ids = tokenizer.encode(_PROBE, add_special_tokens=False).ids
        text = tokenizer.decode(ids, skip_special_tokens=False)
    kept = text == _PROBE and not set(ids) - set(_byte_level_ids(tokenizer))
    if not kept or characters_per_token(tokenizer, vocab_size)[ids].sum() != len(_PROBE):
        raise UserError(
            f"data.tokenizer {path} does not keep text as it is, so bits per character would be wrong; "
            f"use a byte-level tokenizer without normaliser or prefix space"
        )
    return tokenizer


def _refuse_unfit_parts(path: epath.Path, content: str) -> None:
    """Raise UserError for a tokenizer with parts that no byte-level tokenizer has.

    From outside the Rust code, for there some of them panic, which writes to the terminal and is no Exception.
    """
    unfit = {}
    try:
        parts = json.loads(content)
        for name in ("normalizer", "pre_tokenizer"):
            if not _is_byte_level(parts.get(name)):
                unfit[name] = parts[name]
        model = parts["model"]
        if model.get("type", "BPE") != "BPE" or "merges" not in model:
            unfit["model"] = model.get("type")
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(name):
                unfit[name] = model[name]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"data.tokenizer {path} is not a tokenizers JSON file: {error!r}") from None
    if unfit:
        shown = ", ".join(f"{name} {str(value)[:60]}" for name, value in unfit.items())
        raise UserError(
            f"data.tokenizer {path} does not keep text as it is, so bits per character would be wrong ({shown}); "
            f"use a byte-level BPE tokenizer without normaliser, dropout or prefix space"
        )


def _is_byte_level(part: Any) -> bool:
    """Whether a normaliser or pre-tokenizer is of the kinds that byte-level tokenizers are made of."""
    if part is None:
        return True
    if part["type"] == "Sequence":
        return all(map(_is_byte_level, part.get("normalizers", part.get("pretokenizers"))))
    return part["type"] in _BYTE_LEVEL_PARTS


@contextlib.contextmanager
def refusing(message: str) -> Iterator[None]:
    """Raise UserError for whatever the tokenizers library raises.

    The Rust side raises plain Exception, and where it panics a BaseException of a class that has no public name.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{message}: {error}") from error


def encode(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Each document with its token ids, int32 [tokens], the end token before and after them.

    The first end token gives the first real token something to be predicted from.

    Raises:
      UserError: a document is more than the tokenizer can take.
    """
    end = np.array([tokenizer.token_to_id(END_OF_DOCUMENT)], np.int32)
    for chunk in _chunks(documents, characters=1_000_000):
        with refusing(f"the tokenizer fails on one of the documents from {chunk[0][:40]!r} on; use another"):
            encodings = tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
        for document, encoding in zip(chunk, encodings, strict=True):
            yield document, np.concatenate([end, np.array(encoding.ids, np.int32), end])


def characters_per_token(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """How many characters begin in each token, int32 [vocab_size]: its bytes that do not continue a UTF-8 character.

    Summed over the tokens of a text this is the length of the text, though a token may hold a part of a character.
    """
    table = np.zeros(vocab_size, np.int32)
    for id, token in _byte_level_ids(tokenizer).items():
        table[id] = sum((_BYTES[character] & 0xC0) != 0x80 for character in token)
    for id, added in tokenizer.get_added_tokens_decoder().items():
        table[id] = 0 if added.special else len(added.content)
    return table


def _byte_level_ids(tokenizer: Tokenizer) -> dict[int, str]:
    """Tokens spelt in the byte-level alphabet, and those added later as literal text."""
    special = {id for id, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    return {
        id: token
        for token, id in tokenizer.get_vocab(with_added_tokens=False).items()
        if id not in special and all(character in _BYTES for character in token)
    }


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted: printable Latin-1 for itself, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def first_characters(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Documents until `limit` characters are read; the last is whole."""
    read = 0
    for document in documents:
        if read >= limit:
            return
        read += len(document)
        yield document


def _chunks(documents: Iterable[str], characters: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
