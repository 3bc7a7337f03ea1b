import pytest

from shampax.framework.dataset import Codec
from shampax.framework.generation.texts import Text

END = 256
BYTES = Codec(lambda text: list(text.encode()), lambda tokens: bytes(tokens).decode(errors="replace"), (END,))


def written(tokens, stops=(), codec=BYTES, prompt=(65,)):
    """Return the pieces that are shown, and the text."""
    text = Text(codec, prompt, stops)
    pieces = [text.add(token) for token in tokens]
    return [*pieces, text.end()], text


def test_characters_are_shown_when_they_are_complete():
    """Faults: a character appears as two wrong ones; bytes that never become a character hide what follows, or are
    lost at the end."""
    assert written("é漢a".encode())[0] == ["", "é", "", "", "漢", "a", ""]
    assert written(b"\xffb\xc3")[0] == ["", "\ufffdb", "", "\ufffd"]
    assert written(b"\xe6\xbc")[0] == ["", "", "\ufffd"]


def test_a_blank_between_prompt_and_continuation_stays():
    """Fault: decoders that drop the blank at the start of a text join two words."""
    words = Codec(lambda text: [0], lambda tokens: "".join(f" {'abc'[token]}" for token in tokens)[1:], ())
    pieces, text = written([1, 2], codec=words, prompt=[0])
    assert (pieces, text.text) == ([" b", " c", ""], " b c")


@pytest.mark.parametrize(
    ("given", "stops", "text", "finish", "count"),
    [
        ("one\n\ntwo", ["\n\n"], "one", "stop", 5),
        ("one\ntwo", ["\n\n"], "one\ntwo", "length", 7),
        ("one\n", ["\n\n"], "one\n", "length", 4),
        ("aXbY", ["Y", "X"], "a", "stop", 2),
        ("ababac", ["abac"], "ab", "stop", 6),
    ],
)
def test_stop_texts(given, stops, text, finish, count):
    """Faults: a part of a stop text is shown; what only looks like one is lost; the later of two ends the text."""
    pieces, written_text = written(given.encode(), stops)
    assert "".join(pieces) == written_text.text == text
    assert (written_text.finish, written_text.count) == (finish, count)


def test_the_end_of_a_document_ends_the_text():
    """Fault: the text continues into the next document, or shows the end."""
    pieces, text = written([97, END, 98])
    assert ("".join(pieces), text.finish, text.count) == ("a", "end", 1)
