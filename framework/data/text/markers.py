"""The tokens that begin and end a document: named by knobs, by the tokenizer's files, or found by their usual names."""

import contextlib
from typing import Any, NamedTuple

from etils import epath

from ...base.errors import UserError
from ...base.json_files import parse_object
from .spm import SentencePiece
from .tokenizer import END_OF_DOCUMENT

_CONFIG = "tokenizer_config.json"  # of a model folder of Hugging Face, beside the tokenizer
_BEGINS = ("<|begin_of_text|>", "<s>", "<bos>", "[CLS]")  # Llama 3, Llama 2 and Mistral, Gemma, BERT
_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # GPT and Qwen, then as above
_SHOWN = 10


class Markers(NamedTuple):
    """Ids of the token before a document, from which its first token is predicted, and of the one that ends it."""

    begin: int
    end: int


def find(path: epath.Path, tokenizer: Any, begin: int | str, end: int | str) -> Markers:
    """Return the markers of a tokenizer.

    A knob that is set decides; else the model's config beside the tokenizer, or the SentencePiece model; else a usual
    name. A tokenizer without a token that begins documents uses the one that ends them.

    Args:
      path: the tokenizer's file.
      tokenizer: of this file.
      begin: data.begin_token, an id or a name; "" if it is not set.
      end: data.end_token.

    Raises:
      UserError: a token is not in the vocabulary, or none is known to end a document.
    """
    named_begin, named_end = _named(path, tokenizer)
    last = _id(tokenizer, "end", end) if end != "" else named_end
    if last is None:
        last = _first(tokenizer, _ENDS)
    if last is None:
        special = [added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special][:_SHOWN]
        raise UserError(
            f"data.end_token: nothing says which token of {path} ends a document. Set it to a name or an id. Special "
            f"tokens: {', '.join(map(repr, special)) or 'none'}."
        )
    first = _id(tokenizer, "begin", begin) if begin != "" else named_begin
    if first is None and named_end is None:
        first = _first(tokenizer, _BEGINS)
    return Markers(last if first is None else first, last)


def _named(path: epath.Path, tokenizer: Any) -> tuple[int | None, int | None]:
    if isinstance(tokenizer, SentencePiece):
        begin, end = (id if id >= 0 else None for id in (tokenizer.begin, tokenizer.end))
        return begin, end
    config: Any = {}
    with contextlib.suppress(OSError, UnicodeDecodeError):
        config = parse_object((path.parent / _CONFIG).read_text()) or {}
    tokens = (config.get(f"{name}_token") for name in ("bos", "eos"))
    names = (token.get("content") if isinstance(token, dict) else token for token in tokens)
    begin, end = (tokenizer.token_to_id(name) if isinstance(name, str) else None for name in names)
    return begin, end


def _first(tokenizer: Any, names: tuple[str, ...]) -> int | None:
    return next((id for name in names if (id := tokenizer.token_to_id(name)) is not None), None)


def _id(tokenizer: Any, which: str, token: int | str) -> int:
    id = tokenizer.token_to_id(token) if isinstance(token, str) else token
    if id is None or not 0 <= id < max(tokenizer.get_vocab().values()) + 1:
        raise UserError(f"data.{which}_token={token!r}: the tokenizer has no such token. Give a name or an id of it.")
    return id
