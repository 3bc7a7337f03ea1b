"""WordPiece, the tokens of BERT: words cut into the longest pieces that a vocabulary has, "##" before those that go on.

Text is cleaned as published: control characters go, white space is one blank, CJK characters are words, and with
`lower_case` letters are lower-case and without accents. Training is deterministic: the same documents give the same
vocabulary, with the same numbers, in any process.
"""

import collections
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from etils import epath
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ...base.errors import UserError
from .tokenizer import TRAINING_CHARACTERS, first_characters, refusing

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SMALLEST_VOCABULARY = 150  # the special tokens, the smallest alphabet twice, and some pieces
_SMALLEST_ALPHABET, _LARGEST_ALPHABET = 64, 1000  # characters; the published vocabularies have 1,000
_LONGEST_WORD = 100  # characters; a longer one is [UNK]


class Vocabulary(NamedTuple):
    """What masking must know of a vocabulary: its size, and the ids of the special tokens."""

    size: int
    pad: int
    unknown: int
    start: int
    separator: int
    mask: int


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Size and special tokens of a tokenizer of `train_wordpiece` or `load_wordpiece`."""
    ids = tokenizer.get_vocab()
    return Vocabulary(max(ids.values()) + 1, *(ids[token] for token in SPECIAL_TOKENS))


def train_wordpiece(documents: Iterable[str], vocab_size: int, *, lower_case: bool) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens; the special tokens are the first five.

    The alphabet is of the most frequent characters, as many as a tenth of the vocabulary but 64 at least and 1,000 at
    most, each for the start of a word and, where it can be there, for its inside; a word with another one is [UNK].
    Reads 300 M characters at most.
    """
    texts = list(first_characters(documents, TRAINING_CHARACTERS))
    tokenizer = _tokenizer({}, lower_case=lower_case)
    normalizer: Any = tokenizer.normalizer
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    characters = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    alphabet = sorted(characters[: min(max(vocab_size // 10, _SMALLEST_ALPHABET), _LARGEST_ALPHABET)])
    # The trainer numbers an alphabet that it gathers itself in the order of a hash that differs between processes, and
    # settles ties among merges by these numbers. What it is given as special tokens it takes in the given order.
    inside = [f"##{c}" for c in alphabet if _continues(tokenizer, c)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *alphabet, *inside],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _tokenizer(tokenizer.get_vocab(), lower_case=lower_case)


def load_wordpiece(path: epath.Path, vocab_size: int) -> Tokenizer:
    """Read a tokenizers JSON file of a WordPiece model with BERT's special tokens.

    Raises:
      UserError: the file is missing or no such tokenizer, or has more than `vocab_size` tokens.
    """
    try:
        content = path.read_text("utf-8")
        parts = json.loads(content)
        kind = parts["model"]["type"]
    except OSError as error:
        raise UserError(f"data.tokenizer {path} cannot be read ({error.strerror or error}); check the path") from error
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"data.tokenizer {path} is not a tokenizers JSON file: {error!r}") from None
    if kind != "WordPiece":
        raise UserError(f"data.tokenizer {path} has a model of type {kind!r}; masked text needs WordPiece")
    with refusing(f"data.tokenizer {path} is not a tokenizers JSON file"):
        tokenizer = Tokenizer.from_str(content)
        ids = tokenizer.get_vocab()
    tokenizer.encode_special_tokens = True  # "[MASK]" in a document is text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    missing = [token for token in SPECIAL_TOKENS if token not in ids]
    if missing:
        raise UserError(
            f"data.tokenizer {path} has no {', '.join(missing)}; masked text needs {' '.join(SPECIAL_TOKENS)}"
        )
    size = max(ids.values()) + 1
    if size > vocab_size:
        raise UserError(f"data.tokenizer {path} has {size} tokens, data.vocab_size is {vocab_size}; set it to {size}")
    return tokenizer


def _tokenizer(vocabulary: dict[str, int], *, lower_case: bool) -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordPiece(vocabulary, unk_token=SPECIAL_TOKENS[1], max_input_chars_per_word=_LONGEST_WORD)
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower_case)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.WordPiece()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _continues(tokenizer: Tokenizer, character: str) -> bool:
    """Whether a character can stand inside a word, which punctuation cannot."""
    parts: Any = tokenizer
    return len(parts.pre_tokenizer.pre_tokenize_str(parts.normalizer.normalize_str(f"a{character}"))) == 1
