"""The text of a row whose tokens come one after the other."""

from collections.abc import Sequence

from ..dataset import Codec

_CONTEXT = 8  # tokens of the prompt that decide about a blank before the first new one
_INCOMPLETE = "\ufffd"  # what decoders return for the first bytes of a character


class Text:
    """The continuation of a prompt.

    Attributes:
      text: what has been shown so far.
      count: number of new tokens, without the end.
      finish: why it ended: "stop", a stop text came; "end", the model ended it; "length"; or None.
    """

    def __init__(self, codec: Codec, prompt: Sequence[int], stops: Sequence[str] = ()):
        self.text, self.count, self.finish = "", 0, None
        self._codec, self._stops = codec, stops
        self._tokens, self._held = [*prompt[-_CONTEXT:]], ""
        # Tokens from `_first` are decoded together, because some decoders leave out a blank at the start; the text of
        # those up to `_read` has been taken.
        self._first, self._read = 0, len(self._tokens)

    def add(self, token: int) -> str:
        """Return what can be shown after a token: whole characters, and nothing that may become a stop text."""
        if self.finish:
            return ""
        if token in self._codec.ends:
            return self.end("end")
        self._tokens.append(token)
        self.count += 1
        self._held += self._decoded()
        return self._show()

    def end(self, finish: str = "length") -> str:
        """End the text, and return the rest of it, with a replacement for an incomplete character."""
        if self.finish:
            return ""
        self._held += self._decoded(whole=False)
        shown = self._show(last=True)
        self.finish = self.finish or finish
        return shown

    def _decoded(self, whole: bool = True) -> str:
        known = self._codec.decode(self._tokens[self._first : self._read])
        text = self._codec.decode(self._tokens[self._first :])
        if len(text) <= len(known) or (whole and text.endswith(_INCOMPLETE)):
            return ""
        self._first, self._read = self._read, len(self._tokens)
        return text[len(known) :]

    def _show(self, last: bool = False) -> str:
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.finish, end, rest = "stop", min(found), ""
        else:
            starts = (self._started(stop) for stop in self._stops)
            end = len(self._held) - (0 if last else max(starts, default=0))
            rest = self._held[end:]
        shown, self._held = self._held[:end], rest
        self.text += shown
        return shown

    def _started(self, stop: str) -> int:
        """Return the length of the longest end of the text with which the stop text begins."""
        return next((size for size in range(len(stop) - 1, 0, -1) if self._held.endswith(stop[:size])), 0)
