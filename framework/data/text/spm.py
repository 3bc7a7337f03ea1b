"""SentencePiece models behind the methods of a tokenizer of the library `tokenizers`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken

from ...base.errors import UserError


class Encoding(NamedTuple):
    """Tokens of a text."""

    ids: list[int]


class SentencePiece:
    """A SentencePiece model, with the methods of a Tokenizer that are used here.

    Raises:
      UserError: the package `sentencepiece` is not installed.
      RuntimeError: the content is not a model.
    """

    pre_tokenizer = normalizer = decoder = None

    def __init__(self, content: bytes):
        try:
            import sentencepiece
        except ImportError:
            raise UserError(
                "data.tokenizer: a .model file needs sentencepiece. Install it: make install EXTRA=sentencepiece"
            ) from None
        self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=content)

    def encode(self, text: str, add_special_tokens: bool = False) -> Encoding:
        """Return the tokens of a text."""
        assert not add_special_tokens
        return Encoding(self._model.encode(text))

    def encode_batch_fast(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[Encoding]:
        """Return the tokens of several texts."""
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of tokens; control tokens and ids that the vocabulary lacks have none."""
        return self._model.decode([id for id in ids if id < self._model.get_piece_size()])

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Return the ids by token."""
        return {self._model.id_to_piece(id): id for id in range(self._model.get_piece_size())}

    def get_vocab_size(self) -> int:
        """Return the number of tokens."""
        return self._model.get_piece_size()

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Return the control and unknown tokens by id."""
        return {
            id: AddedToken(token, special=True)
            for token, id in self.get_vocab().items()
            if self._model.is_control(id) or self._model.is_unknown(id)
        }

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, None if it is not in the vocabulary."""
        id = self._model.piece_to_id(token)
        return id if self._model.id_to_piece(id) == token else None

    @property
    def begin(self) -> int:
        """The token that the model names as the first of a text; -1 for none."""
        return self._model.bos_id()

    @property
    def end(self) -> int:
        """The token that the model names as the last of a text; -1 for none."""
        return self._model.eos_id()
