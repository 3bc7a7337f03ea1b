import functools

import cloudpickle
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from shampax.framework.data.reading import shards
from shampax.framework.data.text.packing import pack, row_type, to_bytes, unpacked

LENGTHS = st.lists(st.integers(2, 40), max_size=12)


def documents_of(lengths):
    """Return documents in which all tokens differ, so that a token identifies its position; 0 is padding."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end, dtype=np.int32) + 1 for length, end in zip(lengths, ends, strict=True)]


def packed(documents, row_length):
    """Pack documents of which token n stands for n % 7 bytes."""
    return pack([(document, document % 7) for document in documents], row_length)


@given(LENGTHS, st.integers(2, 17))
def test_every_token_is_predicted_exactly_once_from_its_predecessor(lengths, row_length):
    """Faults: a token is lost or doubled where a document continues in the next row; a token is predicted from another
    document; a row has the bytes of other tokens than its targets."""
    documents = documents_of(lengths)
    predicted = []
    for tokens, segments, count in packed(documents, row_length):
        targets = np.flatnonzero((segments[1:] == segments[:-1]) & (segments[1:] > 0)) + 1
        assert (tokens[targets - 1] == tokens[targets] - 1).all()
        assert count == (tokens[targets] % 7).sum()
        predicted.extend(tokens[targets])
    assert predicted == [token for document in documents for token in document[1:]]


@given(LENGTHS, st.integers(2, 17))
def test_rows_are_full(lengths, row_length):
    """Faults: a row has free slots although documents follow; segments do not count from 1."""
    rows = list(packed(documents_of(lengths), row_length))
    for tokens, segments, _ in rows:
        assert tokens.shape == segments.shape == (row_length,)
        assert ((tokens == 0) == (segments == 0)).all()
        real = segments[segments > 0]
        assert real[0] == 1
        assert set(np.diff(real)) <= {0, 1}
        assert (np.diff(np.flatnonzero(segments)) == 1).all()
    for _, segments, _ in rows[:-1]:
        assert (segments == 0).sum() <= 1


def test_known_rows(tmp_path):
    """Faults: positions do not restart; bytes count at tokens that are not targets; padding is wrong."""
    documents = [np.array([0, 5, 6, 0]), np.array([0, 7, 8, 9, 0])]
    kind, path = row_type(6, 10), epath.Path(tmp_path / "rows")
    written = shards.write(path, (to_bytes(row, kind) for row in packed(documents, 6)))
    decode = functools.partial(unpacked, row_type=kind)
    rows = shards.ShardRows({path: written["rows"]}, decode, 0, written["rows"])
    assert len(rows) == 2
    expected = [
        {
            "tokens": [0, 5, 6, 0, 0, 7],
            "segments": [1, 1, 1, 1, 2, 2],
            "positions": [0, 1, 2, 3, 0, 1],
            "bytes": 11,
        },
        {
            "tokens": [7, 8, 9, 0, 0, 0],
            "segments": [1, 1, 1, 1, 0, 0],
            "positions": [0, 1, 2, 3, 0, 1],
            "bytes": 3,
        },
    ]
    assert [{name: array.tolist() for name, array in rows[i].items()} for i in range(len(rows))] == expected
    assert all(array.dtype == np.int32 for array in rows[0].values())


def test_the_hash_depends_only_on_the_rows(tmp_path):
    """Faults: the hash leaves out an array, a row or the row length; it depends on more than these."""
    documents = documents_of([9, 4, 17, 3])

    def content(name, documents=documents, row_length=6):
        rows = (to_bytes(row, row_type(row_length, 100)) for row in packed(documents, row_length))
        return shards.write(epath.Path(tmp_path / name), rows)["content"]

    first = content("first")
    assert content("again") == first
    joined = [np.concatenate(documents[:2]), *documents[2:]]  # same tokens, other segments
    last = [*documents[:-1], documents[-1] + 1]
    others = [content("joined", joined), content("last", last), content("longer", row_length=40)]
    others.append(content("first of all", [documents[0][::-1], *documents[1:]]))
    assert len({first, *others}) == 5


@pytest.mark.parametrize("vocab_size", [256, 65536, 65537])
def test_large_ids_are_stored(vocab_size):
    """Fault: the integer type is too small for the vocabulary."""
    row = np.array([0, vocab_size - 1, vocab_size // 2], np.int32), np.ones(3, np.int32), 2**31 - 1
    kind = row_type(3, vocab_size)
    (back,) = unpacked([to_bytes(row, kind)], kind)
    assert (back["tokens"].tolist(), back["bytes"]) == (row[0].tolist(), row[2])


def test_one_call_reads_all_rows_of_a_shard(tmp_path, monkeypatch):
    """Faults: each row costs a call; rows of several shards, or rows that are asked for twice, come in another order;
    rows cannot be sent to a worker."""
    counts = {tmp_path / name: 10 for name in "abc"}
    for number, path in enumerate(counts):
        shards.write(epath.Path(path), (bytes([10 * number + row]) for row in range(10)))
    calls = []

    class Reader:
        def __init__(self, path, options):
            self._reader = ArrayRecordReader(path, options)

        def __getattr__(self, name):
            return getattr(self._reader, name)

        def read(self, rows):
            calls.append(rows)
            return self._reader.read(rows)

    rows = shards.ShardRows(counts, lambda contents: [content[0] for content in contents], 5, 25)
    wanted = [19, 0, 4, 7, 7, 12, 1]
    with monkeypatch.context() as patch:
        patch.setattr(shards, "ArrayRecordReader", Reader)
        assert rows.__getitems__(wanted) == [5 + index for index in wanted]
    assert sorted(map(sorted, calls)) == [[2, 2, 7], [4], [5, 6, 9]]
    again = cloudpickle.loads(cloudpickle.dumps(rows))
    assert (len(again), again[3], again.__getitems__(wanted)) == (20, 8, [5 + index for index in wanted])


def test_a_failed_write_leaves_no_shard(tmp_path):
    """Fault: the next run uses a partly written shard."""

    def rows():
        yield b"row"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.write(epath.Path(tmp_path / "a"), rows())
    assert list(tmp_path.iterdir()) == []
