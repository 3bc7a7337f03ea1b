import codecs
import os

import numpy as np
import pytest
from etils import epath

from shampax.framework.base.errors import UserError
from shampax.framework.data.clicks import ClickData
from shampax.framework.data.pairs import PairData
from shampax.framework.data.reading import files, tsv
from shampax.framework.data.text import TextData

TEXTS = [f"text {number}" for number in range(12)]


def found(pattern, suffixes=(".txt", "")):
    return [os.fspath(path) for path in files.find("data.source", str(pattern), suffixes)]


@pytest.mark.parametrize("name", ["[v2] corpus", "what?", "a*b", "[", "**"])
def test_folders_that_exist_are_taken_as_they_are(tmp_path, name):
    """Faults: a folder with characters of a glob "matches no file"; another folder is read."""
    (tmp_path / name).mkdir()
    (tmp_path / "v corpus").mkdir()
    for folder in (name, "v corpus"):
        (tmp_path / folder / "[a].txt").write_text("text")
    assert found(tmp_path / name / "*.txt") == [str(tmp_path / name / "[a].txt")]
    assert found(tmp_path / name / "[a].txt") == [str(tmp_path / name / "[a].txt")]
    assert len(found(tmp_path / "**" / "*.txt")) == (1 if name == "**" else 2)


def test_a_file_under_several_paths_is_read_once(tmp_path):
    """Fault: a link doubles the weight of a document, or a held-out file is trained on under another name."""
    (tmp_path / "a.txt").write_text("text")
    os.link(tmp_path / "a.txt", tmp_path / "b.txt")
    os.symlink(tmp_path / "a.txt", tmp_path / "c.txt")
    (tmp_path / "d.txt").write_text("text")
    assert found(tmp_path / "*.txt") == [str(tmp_path / "a.txt"), str(tmp_path / "d.txt")]
    os.symlink(tmp_path / "d.txt", tmp_path / "day_23")
    data = ClickData(source=f"file:{tmp_path}/*.txt", heldout_files="day_23")
    assert [stream.split for stream in data.open_source().streams] == ["train", "heldout"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (name, data)
        for name in ("a.csv", "a.XLSX.gz", "a.npy.zst", "a.jsonl.7z")
        for data in (TextData, PairData, ClickData)
    ]
    + [("a.jsonl", ClickData), ("a.parquet.bz2", ClickData)],
)
def test_files_of_other_formats_are_refused_by_name(tmp_path, name, data):
    """Fault: tables or archives are trained on as raw text."""
    (tmp_path / name).write_text("".join('{"text": "a"}\n' for _ in range(20)))
    with pytest.raises(UserError, match=rf"data.source: .*{name} has the suffix '\.\w+'. Files may end in \.t"):
        data(source=f"file:{tmp_path}/*").open_source()


@pytest.mark.parametrize("name", ["a.txt", "a.tsv"])
def test_a_byte_order_mark_is_dropped(tmp_path, name):
    """Faults: the mark is trained on as text; one inside a file is lost."""
    mark, end = codecs.BOM_UTF8.decode(), "\f" if name == "a.txt" else "\n"
    (tmp_path / name).write_text(mark + end.join([*TEXTS, f"in{mark}side"]))
    source = TextData(source=f"file:{tmp_path}/*").open_source()
    records = [record for split in ("train", "heldout") for record in source.records(split)]
    assert sorted(records) == sorted([*TEXTS, f"in{mark}side"])


def test_blank_lines_at_the_end_are_no_rows(tmp_path):
    """Faults: a blank line at the end of a log is malformed; one inside a file is not."""
    path = epath.Path(tmp_path / "a.tsv")
    for end in ("", "\n", "\r\n", "\n\n\n", "\n\r\n"):
        path.write_text(f"a\tb\n\n\nc\td{end}")
        numbers = [number for number, _ in tsv.lines(path)]
        assert numbers == [1, 2, 3, 4]
        assert [str(row) for row in tsv.read(path)][1].endswith("row 2: 1 columns, expected 2")


@pytest.mark.parametrize(
    ("alphabet", "least"), [("abcdefghij \n", 80), ("abcdefghij\r\n", 80), ("abcdefghij ", 80), ("漢字漢字中文", 25)]
)
def test_one_file_is_a_corpus(tmp_path, alphabet, least):
    """Faults: a single input.txt is refused; cutting it loses text, or mixes it up; parts do not end at line ends."""
    text = "".join(np.random.default_rng(0).choice(list(alphabet), 50_000))
    (tmp_path / "input.txt").write_text(f"{text[:100]}\f{text[100:]}", newline="")
    source = TextData(source=f"file:{tmp_path}/input.txt").open_source()
    train, heldout = (list(source.records(split)) for split in ("train", "heldout"))
    parts, start = {*train, *heldout}, 0
    assert least <= len(parts) <= 110 and len(heldout) >= 2
    for number in range(len(parts)):
        part = max((part for part in parts if text.startswith(part, start)), key=len)
        start += len(part)
        assert part.endswith("\n") or "\n" not in alphabet or number == 0 or start == len(text)
    assert start == len(text)


@pytest.mark.parametrize(("fraction", "expected"), [(0.01, 1), (0.1, 2), (0.5, 10), (0.99, 19)])
def test_the_held_out_fraction_of_few_records_is_exact(tmp_path, fraction, expected):
    """Faults: few records have none to hold out, or none to train on; the knob has no effect."""
    (tmp_path / "a.txt").write_text("\f".join(f"text {number}" for number in range(20)))
    source = TextData(source=f"file:{tmp_path}/a.txt", heldout_fraction=fraction).open_source()
    assert len(list(source.records("heldout"))) == expected
    assert len(list(source.records("train"))) == 20 - expected


def test_the_held_out_set_is_stable(tmp_path):
    """Faults: a file added or read in another order moves documents to another split; equal texts are in both."""
    for name, numbers in (("b", range(1000)), ("a", range(500, 1500))):
        (tmp_path / f"{name}.txt").write_text("\f".join(f"text {number}" for number in numbers))
    one, two = (TextData(source=f"file:{tmp_path}/{name}.txt").open_source() for name in "b*")
    before, after = (set(source.records("heldout")) for source in (one, two))
    assert 60 < len(before) < 140
    assert before == after & {f"text {number}" for number in range(1000)}
    assert not after & set(two.records("train"))
