import gzip
import lzma
import math
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shampax.framework.base.errors import UserError
from shampax.framework.data.reading import files, tsv
from shampax.framework.data.reading.records import Malformed
from shampax.framework.data.reading.tsv import Column

CLICKS = [Column("int"), Column("int", 0), Column("float", math.nan), Column("text", "")]
BYTES = st.lists(st.sampled_from([b"\t", b"\n", b"\r\n", b"7", b"-1", b"x", b"\0", b"\xff", "é".encode(), b"1.5"]))


def rows(tmp_path, content, columns=None, name="a.tsv"):
    path = tmp_path / name
    path.write_bytes(content)
    return [
        str(row).removeprefix(f"{tmp_path}/") if isinstance(row, Malformed) else row for row in tsv.read(path, columns)
    ]


def test_fields_have_the_types_of_their_columns(tmp_path):
    """Fault: an empty field taken for a missing one, a sign lost, a carriage return kept, or the last line dropped."""
    content = "1\t-12\t2.5e3\ta b\r\n0\t\t-.5\t\n1\t9223372036854775807\t7\t漢\u2028字"
    assert rows(tmp_path, content.encode(), CLICKS) == [
        (1, -12, 2500.0, "a b"),
        (0, 0, -0.5, ""),
        (1, 2**63 - 1, 7.0, "漢\u2028字"),
    ]
    ((*_, value, _),) = rows(tmp_path, b"1\t1\t\t\n", CLICKS)
    assert math.isnan(value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"1\t2\t3", "3 columns, expected 4"),
        (b"", "1 columns, expected 4"),
        (b"1\t2\t3\t4\t5", "5 columns, expected 4"),
        (b"\t2\t3\t4", "column 1 is empty"),
        (b"1_000\t2\t3\t4", "column 1 is no integer of 64 bits: '1_000'"),
        ("٣\t2\t3\t4".encode(), "column 1 is no integer of 64 bits: '٣'"),
        (b"1\t 2\t3\t4", "column 2 is no integer of 64 bits: ' 2'"),
        (b"1\t9223372036854775808\t3\t4", "column 2 is no integer of 64 bits: '9223372036854775808'"),
        (b"1\t" + 5000 * b"9" + b"\t3\t4", f"column 2 is no integer of 64 bits: '{37 * '9'}...'"),
        (b"1\t2\tnan\t4", "column 3 is no finite number: 'nan'"),
        (b"1\t2\t1e999\t4", "column 3 is no finite number: '1e999'"),
        (b"1\t2\t3\t\xff", "not UTF-8 at byte 6"),
        (b"1\t2\t3\t\0", "a NUL at byte 6"),
    ],
)
def test_malformed_rows_are_named_and_the_others_kept(tmp_path, line, reason):
    """Fault: what Python reads as a number and no file should hold, or a bad row that ends the reading."""
    good = b"1\t2\t3\t4\n"
    assert rows(tmp_path, good + line + b"\n" + good, CLICKS) == [
        (1, 2, 3.0, "4"),
        f"a.tsv, row 2: {reason}",
        (1, 2, 3.0, "4"),
    ]


def test_without_columns_the_first_readable_row_decides(tmp_path):
    """Fault: a bad first row that makes all others bad."""
    assert rows(tmp_path, b"\xff\na\tb\n\t\nc\n") == [
        "a.tsv, row 1: not UTF-8 at byte 0",
        ("a", "b"),
        ("", ""),
        "a.tsv, row 4: 1 columns, expected 2",
    ]


def test_a_line_without_end_is_malformed(tmp_path, monkeypatch):
    """Fault: a line cut at the limit and taken for two rows, or one that hides the rows after it."""
    monkeypatch.setattr(tsv, "LONGEST_ROW", 8)
    monkeypatch.setattr(files, "_CHUNK", 3)
    content = b"a\tb\n" + 100 * b"x" + b"\nc\td\n" + 9 * b"y"
    assert rows(tmp_path, content) == [
        ("a", "b"),
        "a.tsv, row 2: more than 8 bytes",
        ("c", "d"),
        "a.tsv, row 4: more than 8 bytes",
    ]


def test_a_line_without_end_is_not_held(tmp_path, monkeypatch):
    """Fault: a file without line ends fills the memory."""
    monkeypatch.setattr(files, "_chunks", lambda *_: (b"x" * 2**20 for _ in range(50)))
    tracemalloc.start()
    assert len(list(files.records(tmp_path, b"\n", 2**21))) == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


@settings(deadline=None, max_examples=60)
@given(BYTES.map(b"".join), st.integers(1, 5))
def test_rows_do_not_depend_on_how_a_file_is_read(tmp_path_factory, content, size):
    """Fault: a row cut where a read ends, or a last empty row that there is not."""
    tmp_path = tmp_path_factory.mktemp("rows")
    whole = rows(tmp_path, content, CLICKS)
    assert len(whole) == content.count(b"\n") + bool(content and not content.endswith(b"\n"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_CHUNK", size)
        assert repr(rows(tmp_path, content, CLICKS)) == repr(whole)


@pytest.mark.parametrize(("suffix", "compress"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_compressed_files(tmp_path, suffix, compress):
    """Fault: a file cut short passes for a whole one, or fails with a traceback."""
    content = compress(b"a\tb\n" * 10_000)
    assert rows(tmp_path, content, name=f"a.tsv{suffix}") == [("a", "b")] * 10_000
    for damaged in (content[:-20], content[:30] + b"damaged" + content[37:], b"plain text"):
        with pytest.raises(UserError, match=rf"a\.tsv\{suffix} cannot be read"):
            rows(tmp_path, damaged, name=f"a.tsv{suffix}")
