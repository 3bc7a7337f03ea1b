import gzip
import lzma
import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shampax.framework.base.errors import UserError
from shampax.framework.data.reading import files, tsv
from shampax.framework.data.reading.malformed import Malformed

BYTES = st.lists(st.sampled_from([b"\t", b"\n", b"\r\n", b"7", b"-1", b"x", b"\0", b"\xff", "é".encode(), b"1.5"]))


def rows(tmp_path, content, name="a.tsv"):
    path = tmp_path / name
    path.write_bytes(content)
    return [str(row).removeprefix(f"{tmp_path}/") if isinstance(row, Malformed) else row for row in tsv.read(path)]


def test_fields_are_not_changed(tmp_path):
    """Faults: an empty field counts as missing; a carriage return is kept; the last line is dropped."""
    content = "1\t-12\ta b\r\n0\t\t\n1\t9\t漢\u2028字"
    assert rows(tmp_path, content.encode()) == [["1", "-12", "a b"], ["0", "", ""], ["1", "9", "漢\u2028字"]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"1\t2\t3", "3 columns, expected 4"),
        (b"", "1 columns, expected 4"),
        (b"1\t2\t3\t4\t5", "5 columns, expected 4"),
        (b"1\t2\t3\t\xff", "not UTF-8 at byte 6"),
        (b"1\t2\t3\t\0", "a NUL at byte 6"),
    ],
)
def test_malformed_rows_are_named_and_the_others_kept(tmp_path, line, reason):
    """Faults: a bad row ends the reading; a bad row counts as good."""
    good = b"1\t2\t3\t4\n"
    fields = ["1", "2", "3", "4"]
    assert rows(tmp_path, good + line + b"\n" + good) == [fields, f"a.tsv, row 2: {reason}", fields]


def test_the_first_readable_row_sets_the_number_of_columns(tmp_path):
    """Fault: a bad first row makes all others malformed."""
    assert rows(tmp_path, b"\xff\na\tb\n\t\nc\n") == [
        "a.tsv, row 1: not UTF-8 at byte 0",
        ["a", "b"],
        ["", ""],
        "a.tsv, row 4: 1 columns, expected 2",
    ]


def test_a_too_long_line_is_malformed(tmp_path, monkeypatch):
    """Faults: a line cut at the limit counts as two rows; it hides the rows after it."""
    monkeypatch.setattr(tsv, "LONGEST_ROW", 8)
    monkeypatch.setattr(files, "_CHUNK", 3)
    content = b"a\tb\n" + 100 * b"x" + b"\nc\td\n" + 9 * b"y"
    assert rows(tmp_path, content) == [
        ["a", "b"],
        "a.tsv, row 2: more than 8 bytes",
        ["c", "d"],
        "a.tsv, row 4: more than 8 bytes",
    ]


def test_a_too_long_line_is_not_kept_in_memory(tmp_path, monkeypatch):
    """Fault: a file without line ends exhausts the memory."""
    monkeypatch.setattr(files, "chunks", lambda *_: (b"x" * 2**20 for _ in range(50)))
    tracemalloc.start()
    assert len(list(files.pieces(tmp_path, b"\n", 2**21))) == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


@settings(deadline=None, max_examples=60)
@given(BYTES.map(b"".join), st.integers(1, 5))
def test_rows_do_not_depend_on_how_a_file_is_read(tmp_path_factory, content, size):
    """Faults: a row is cut where a read ends; an empty last row is added."""
    tmp_path = tmp_path_factory.mktemp("rows")
    whole = rows(tmp_path, content)
    text = re.sub(rb"(^|\n)(\r?\n)*\Z", b"", content)  # blank lines at the end are no rows
    assert len(whole) == (text.count(b"\n") + 1 if text else 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_CHUNK", size)
        assert repr(rows(tmp_path, content)) == repr(whole)


@pytest.mark.parametrize(("suffix", "compress"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_compressed_files(tmp_path, suffix, compress):
    """Faults: a truncated file counts as complete, or is a traceback."""
    content = compress(b"a\tb\n" * 10_000)
    assert rows(tmp_path, content, name=f"a.tsv{suffix}") == [["a", "b"]] * 10_000
    for damaged in (content[:-20], content[:30] + b"damaged" + content[37:], b"plain text"):
        with pytest.raises(UserError, match=rf"a\.tsv\{suffix}: cannot be read"):
            rows(tmp_path, damaged, name=f"a.tsv{suffix}")
