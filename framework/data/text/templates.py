"""Chat templates: conversations as texts between special tokens, of which the assistant's are trained on."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ...base.errors import UserError
from .markers import Markers

ROLES = ("system", "user", "assistant")
BEGIN, END = "<begin>", "<end>"  # in a template: the tokens before and after a document of the tokenizer


class Message(NamedTuple):
    """A message of a conversation; the role is one of `ROLES`."""

    role: str
    content: str


class Piece(NamedTuple):
    """A special token, or a text that has none, and whether it is trained on."""

    text: str
    special: bool
    trained: bool


@dataclasses.dataclass(frozen=True)
class Template:
    """The markup of a conversation.

    Attributes:
      special: names of the special tokens in the other texts.
      begin: before the first message.
      before: before the content of a message; {role} is its role.
      end: after the content of an assistant's message, trained on.
      other_end: after that of another one.
      between: after each message.
      names: role -> its name here.
      stripped: whether white space around a content is dropped.
      joins_system: whether a system message becomes the beginning of the user's.
    """

    special: tuple[str, ...]
    begin: str = ""
    before: str = ""
    end: str = END
    other_end: str = ""
    between: str = ""
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stripped: bool = False
    joins_system: bool = False

    def pieces(self, messages: Sequence[Message]) -> Iterator[Piece]:
        """Yield a conversation piece by piece. Content that spells a special token is text."""
        if self.joins_system and messages[0].role == "system":
            system, first, *others = messages
            messages = [Message(first.role, f"{system.content}\n\n{first.content}"), *others]
        held = ""  # text that is not trained on, encoded as one
        for text, markup, trained in self._parts(messages):
            split = re.split(f"({'|'.join(map(re.escape, self.special))})", text) if markup else [text]
            for part in filter(None, split):
                special = markup and part in self.special
                if not special and not trained:
                    held += part
                    continue
                if held:
                    yield Piece(held, False, False)
                    held = ""
                yield Piece(part, special, trained)
        if held:
            yield Piece(held, False, False)

    def _parts(self, messages: Sequence[Message]) -> Iterator[tuple[str, bool, bool]]:
        """Yield texts, whether they are markup, and whether they are trained on."""
        yield self.begin, True, False
        for role, content in messages:
            trained = role == "assistant"
            yield self.before.format(role=self.names.get(role, role)), True, False
            yield content.strip() if self.stripped else content, False, trained
            yield (self.end if trained else self.other_end), True, trained
            yield self.between, True, False


TEMPLATES = {
    # Llama 3's model card.
    "llama3": Template(
        special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        begin="<|begin_of_text|>",
        before="<|start_header_id|>{role}<|end_header_id|>\n\n",
        end="<|eot_id|>",
        other_end="<|eot_id|>",
        stripped=True,
    ),
    # Qwen and others.
    "chatml": Template(
        special=("<|im_start|>", "<|im_end|>"),
        before="<|im_start|>{role}\n",
        end="<|im_end|>",
        other_end="<|im_end|>",
        between="\n",
    ),
    "gemma": Template(
        special=("<bos>", "<start_of_turn>", "<end_of_turn>"),
        begin="<bos>",
        before="<start_of_turn>{role}\n",
        end="<end_of_turn>",
        other_end="<end_of_turn>",
        between="\n",
        names={"assistant": "model"},
        stripped=True,
        joins_system=True,
    ),
    # The contents one after the other, for prompts and completions, and tokenizers without tokens for chats.
    "plain": Template(special=(BEGIN, END), begin=BEGIN),
}


def choose(name: str, tokenizer: Any, markers: Markers) -> tuple[Template, dict[str, int]]:
    """Return a template, and its special tokens -> ids.

    Args:
      name: one of `TEMPLATES`, or "auto" for the first one whose tokens the tokenizer has.
      tokenizer: the tokenizer.
      markers: its tokens before and after a document.

    Raises:
      UserError: the tokenizer has no such token.
    """
    for each in TEMPLATES if name == "auto" else [name]:
        template = TEMPLATES[each]
        ids = {BEGIN: markers.begin, END: markers.end}
        ids |= {token: tokenizer.token_to_id(token) for token in template.special if token not in ids}
        missing = [token for token, id in ids.items() if id is None]
        if not missing:
            return template, ids
    raise UserError(
        f"data.template={name!r}: the tokenizer has no token {missing[0]!r}. Use 'plain', or another tokenizer."
    )
