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


def test_a_data_set_need_not_have_a_fingerprint(tmp_path):
    """Fault: a user's own data set is refused for lack of one."""
    assert fingerprint(toy.ToyData(), tmp_path) == ""


def test_the_fingerprint_is_that_of_the_content(source, tmp_path):
    """Fault: a file that was only touched, moved or packed again stops a run, or a changed one does not."""
    first = prepared(source, tmp_path / "cache")
    assert len(first) >= 12
    assert prepared(source, tmp_path / "cache") == first
    os.utime(source, (1, 1))
    assert prepared(source, tmp_path / "cache") == first
    moved = source.rename(tmp_path / "b.txt")
    assert prepared(moved, tmp_path / "other cache") == first
    for changed in (0, 9):  # of the training and of the held-out split
        texts = list(TEXTS)
        texts[changed] = texts[changed].replace("some", "same")
        moved.write_text("\f".join(texts))
        assert prepared(moved, tmp_path / "cache") != first


def test_the_fingerprint_knows_how_text_was_cut(source, tmp_path):
    """Fault: other documents of the same text, or other lengths of rows, pass for the same."""
    first = prepared(source, tmp_path / "cache")
    assert prepared(source, tmp_path / "cache", max_documents=5) != first
    source.write_text("\f".join(TEXTS[:-2]) + "\f" + "".join(TEXTS[-2:]))
    assert prepared(source, tmp_path / "cache") != first


def test_without_rows_there_is_no_fingerprint(source, tmp_path):
    """Fault: a traceback where nothing is prepared or the note beside the rows is damaged."""
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
