"""WordPiece, the tokens of BERT: words cut into the longest pieces of a vocabulary; "##" begins a piece inside a word.

Text is cleaned as published: control characters are removed, white space becomes one blank, CJK characters are words,
and with `lower_case` letters are lower-cased and stripped of accents. Training is deterministic: the same documents
give the same vocabulary with the same ids in any process.
"""

import collections
from collections.abc import Iterable
from typing import Any, NamedTuple

from etils import epath
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ...base.errors import UserError
from .tokenizer import first_characters, load_tokenizer, train_on

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SMALLEST_VOCABULARY = 150  # the special tokens, the smallest alphabet twice, and some pieces
_SMALLEST_ALPHABET, _LARGEST_ALPHABET = 64, 1000  # characters; the published vocabularies have 1,000
_LONGEST_WORD = 100  # characters; a longer word is [UNK]


class Vocabulary(NamedTuple):
    """The size of a vocabulary and the ids of its special tokens."""

    size: int
    pad: int
    unknown: int
    start: int
    separator: int
    mask: int


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Return size and special tokens of a tokenizer of `train_wordpiece` or `load_wordpiece`."""
    ids = tokenizer.get_vocab()
    return Vocabulary(max(ids.values()) + 1, *(ids[token] for token in SPECIAL_TOKENS))


def train_wordpiece(documents: Iterable[str], vocab_size: int, *, lower_case: bool) -> Tokenizer:
    """Train a tokenizer of at most `vocab_size` tokens; the special tokens are the first five.

    The alphabet holds the most frequent characters: a tenth of the vocabulary, at least 64 and at most 1,000. Each may
    begin a word and, except punctuation, stand inside one. A word with another character is [UNK]. Reads at most 300 M
    characters.
    """
    texts = list(first_characters(documents))
    tokenizer = _tokenizer({}, lower_case=lower_case)
    normalizer: Any = tokenizer.normalizer
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    characters = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    alphabet = sorted(characters[: min(max(vocab_size // 10, _SMALLEST_ALPHABET), _LARGEST_ALPHABET)])
    # The trainer numbers an alphabet that it collects itself in the order of a hash that differs between processes, and
    # breaks ties between merges by these numbers. Special tokens keep the given order.
    inside = [f"##{c}" for c in alphabet if _continues(tokenizer, c)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *alphabet, *inside],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    train_on(tokenizer, texts, trainer)
    return _tokenizer(tokenizer.get_vocab(), lower_case=lower_case)


def load_wordpiece(path: epath.Path, vocab_size: int) -> Tokenizer:
    """Read a tokenizers JSON file of a WordPiece model with BERT's special tokens.

    Raises:
      UserError: the file is missing or invalid, has another model, or more than `vocab_size` tokens.
    """
    tokenizer = load_tokenizer(path, vocab_size)
    if not isinstance(getattr(tokenizer, "model", None), models.WordPiece):
        kind = type(getattr(tokenizer, "model", tokenizer)).__name__
        raise UserError(f"data.tokenizer={path}: has a model of type {kind!r}; masked text needs WordPiece")
    missing = [token for token in SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
    if missing:
        raise UserError(
            f"data.tokenizer={path}: has no {', '.join(missing)}; masked text needs {' '.join(SPECIAL_TOKENS)}"
        )
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
    """Return whether a character may stand inside a word; punctuation may not."""
    parts: Any = tokenizer
    return len(parts.pre_tokenizer.pre_tokenize_str(parts.normalizer.normalize_str(f"a{character}"))) == 1
