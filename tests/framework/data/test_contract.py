import os

import pytest
import toy

from shampax.framework.base.errors import UserError
from shampax.framework.data.text import TextData
from shampax.framework.dataset import fingerprint

TEXTS = [f"Document {i} of some." * 3 for i in range(20)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\f".join(TEXTS))
    return path


def prepared(source, cache, **fields):
    data = TextData(source=f"file:{source}", sequence_length=16, vocab_size=300, **fields)
    data.prepare(cache)
    return fingerprint(data, cache)


def test_a_fingerprint_is_optional(tmp_path):
    """Fault: a user's own data set without a fingerprint is refused."""
    assert fingerprint(toy.ToyData(), tmp_path) == ""


def test_the_fingerprint_depends_on_the_content(source, tmp_path):
    """Faults: a touched, moved or repacked file stops a run; a changed one does not."""
    first = prepared(source, tmp_path / "cache")
    assert len(first) >= 12
    assert prepared(source, tmp_path / "cache") == first
    os.utime(source, (1, 1))
    assert prepared(source, tmp_path / "cache") == first
    moved = source.rename(tmp_path / "b.txt")
    assert prepared(moved, tmp_path / "other cache") == first
    for changed in (0, 9):  # training and held-out split
        texts = list(TEXTS)
        texts[changed] = texts[changed].replace("some", "same")
        moved.write_text("\f".join(texts))
        assert prepared(moved, tmp_path / "cache") != first


def test_the_fingerprint_depends_on_how_text_was_split(source, tmp_path):
    """Fault: other documents or row lengths of the same text have the same fingerprint."""
    first = prepared(source, tmp_path / "cache")
    assert prepared(source, tmp_path / "cache", max_records=5) != first
    source.write_text("\f".join(TEXTS[:-2]) + "\f" + "".join(TEXTS[-2:]))
    assert prepared(source, tmp_path / "cache") != first


def test_without_rows_there_is_no_fingerprint(source, tmp_path):
    """Fault: a traceback if nothing is prepared or the note with the rows is damaged."""
    cache = tmp_path / "cache"
    data = TextData(source=f"file:{source}", sequence_length=16, vocab_size=300)
    with pytest.raises(UserError, match="call prepare first"):
        data.fingerprint(cache)
    data.prepare(cache)
    (stamp,) = cache.glob("rows-*/manifest.json")
    for content in ("", "{}", "[]", '{"content": "a", "train": {}}'):
        stamp.write_text(content)
        with pytest.raises(UserError, match=r"manifest\.json"):
            data.fingerprint(cache)
        with pytest.raises(UserError, match=r"manifest\.json"):
            data.prepare(cache)
