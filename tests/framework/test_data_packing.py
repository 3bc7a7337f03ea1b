import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shampax.framework.data import packing
from shampax.framework.data.packing import AtomicDirectory, PackedRows, pack, real_targets, write_rows

LENGTHS = st.lists(st.integers(2, 40), max_size=12)


def documents_of(lengths):
    """Documents whose every token is different, so that a token names its place; 0 is left to padding."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end, dtype=np.int32) + 1 for length, end in zip(lengths, ends, strict=True)]


@given(LENGTHS, st.integers(2, 17))
def test_every_token_is_predicted_exactly_once_from_its_predecessor(lengths, row_length):
    """Fault: a token lost or doubled where a document goes on in the next row, or predicted across documents."""
    documents = documents_of(lengths)
    predicted = []
    for tokens, segments in pack(documents, row_length):
        for slot in np.flatnonzero(real_targets(segments)):
            assert tokens[slot - 1] == tokens[slot] - 1
            predicted.append(tokens[slot])
    assert predicted == [token for document in documents for token in document[1:]]


@given(LENGTHS, st.integers(2, 17))
def test_rows_are_full(lengths, row_length):
    """Fault: room left in a row though documents follow, or segments that do not count from 1."""
    rows = list(pack(documents_of(lengths), row_length))
    for tokens, segments in rows:
        assert tokens.shape == segments.shape == (row_length,)
        assert ((tokens == 0) == (segments == 0)).all()
        real = segments[segments > 0]
        assert real[0] == 1
        assert set(np.diff(real)) <= {0, 1}
        assert (np.diff(np.flatnonzero(segments)) == 1).all()
    for _, segments in rows[:-1]:
        assert (segments == 0).sum() <= 1


def test_known_rows(tmp_path):
    """Fault: positions that do not restart, characters counted at tokens that are no targets, or wrong padding."""
    documents = [np.array([0, 5, 6, 0]), np.array([0, 7, 8, 9, 0])]
    assert write_rows(tmp_path / "rows", pack(documents, 6), row_length=6, vocab_size=10)[0] == 2
    np.save(tmp_path / "characters.npy", np.array([0, 0, 0, 0, 0, 1, 2, 3, 4, 5], np.int32))
    rows = PackedRows(tmp_path / "rows", tmp_path / "characters.npy")
    expected = [
        {
            "tokens": [0, 5, 6, 0, 0, 7],
            "segments": [1, 1, 1, 1, 2, 2],
            "positions": [0, 1, 2, 3, 0, 1],
            "characters": [0, 1, 2, 0, 0, 3],
        },
        {
            "tokens": [7, 8, 9, 0, 0, 0],
            "segments": [1, 1, 1, 1, 0, 0],
            "positions": [0, 1, 2, 3, 0, 1],
            "characters": [0, 4, 5, 0, 0, 0],
        },
    ]
    assert [{name: array.tolist() for name, array in rows[i].items()} for i in range(len(rows))] == expected
    assert all(array.dtype == np.int32 for array in rows[0].values())
    copy = pickle.loads(pickle.dumps(rows))
    assert {name: array.tolist() for name, array in copy[1].items()} == expected[1]


def test_the_hash_is_that_of_the_rows(tmp_path, monkeypatch):
    """Fault: a hash that leaves out an array, a row or the length of rows, or that depends on more than these."""
    documents = documents_of([9, 4, 17, 3])

    def content(name, documents=documents, row_length=6):
        return write_rows(tmp_path / name, pack(documents, row_length), row_length, vocab_size=100)[1]

    first = content("first")
    monkeypatch.setattr(packing, "_ROWS_PER_WRITE", 2)
    assert content("again") == first
    joined = [np.concatenate(documents[:2]), *documents[2:]]  # the same tokens in other segments
    last = [*documents[:-1], documents[-1] + 1]
    others = [content("joined", joined), content("last", last), content("longer", row_length=40)]
    others.append(content("first of all", [documents[0][::-1], *documents[1:]]))
    assert len({first, *others}) == 5


@pytest.mark.parametrize("vocab_size", [256, 65536, 65537])
def test_large_ids_survive_the_file(tmp_path, vocab_size):
    """Fault: a dtype too small for the vocabulary, or a header that disagrees with the rows written."""
    row = np.array([0, vocab_size - 1, vocab_size // 2], np.int32)
    count, _ = write_rows(tmp_path / "rows", iter([(row, np.ones(3, np.int32))] * 1500), 3, vocab_size)
    stored = np.load(tmp_path / "rows" / "tokens.npy", mmap_mode="r")
    assert count == 1500
    assert stored.shape == (1500, 3)
    assert (stored == row).all()


def test_a_failed_write_leaves_nothing(tmp_path):
    """Fault: half-written rows that the next run takes for whole ones."""
    (tmp_path / "rows.partial").mkdir()
    (tmp_path / "rows.partial" / "leftover").touch()

    def fill():
        with AtomicDirectory(tmp_path / "rows") as partial:
            assert list(partial.iterdir()) == []
            (partial / "file").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert list(tmp_path.iterdir()) == []
