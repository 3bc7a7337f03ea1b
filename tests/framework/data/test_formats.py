import bz2
import gzip
import io
import json
import lzma
import re
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from etils import epath

from shampax.framework.base.errors import UserError
from shampax.framework.data.masked import MaskedTextData
from shampax.framework.data.pairs import PairData
from shampax.framework.data.reading import fields, files
from shampax.framework.data.reading.malformed import Malformed
from shampax.framework.data.text import TextData
from shampax.framework.dataset import SPLITS

TEXT = pa.string()
# What a plain text file can hold too: one that a form feed ends.
WORDS, END = "naïve 漢字\ttext\r\n ", '👩‍🚀 \ufeff\u2028 \\u0041\\n {}],[ "'
PLAIN = [f"Document {i}: {WORDS * (i % 5 + 1)}{END}" for i in range(40)]
HARD = ["form\ffeed", "\ufeffmark", "end\n", "\n\nstart", "nul \0 and \x7f", "]", '"', "\\", "1", "a" * 5_000]


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSIONS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstd,
    # As `cat a.zst b.zst` and parallel compressors write it.
    " frames.zst": lambda content: b"".join(map(zstd, (content[i : i + 999] for i in range(0, len(content), 999)))),
}


def as_table(texts, kind=TEXT):
    return pa.table({"id": range(len(texts)), "text": pa.array(texts, kind)})


def as_parquet(texts, kind=TEXT, **options):
    sink = io.BytesIO()
    pa.parquet.write_table(as_table(texts, kind), sink, row_group_size=7, **options)
    return sink.getvalue()


def as_arrow(texts, opened=pa.ipc.new_stream, kind=TEXT):
    sink, table = io.BytesIO(), as_table(texts, kind)
    with opened(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return sink.getvalue()


def objects(texts):
    return [{"id": i, "text": text} for i, text in enumerate(texts)]


def lines(texts, **options):
    return "".join(json.dumps(each, **options) + "\n" for each in objects(texts)).encode()


FORMATS = {
    "a.jsonl": lines,
    "unescaped.jsonl": lambda texts: lines(texts, ensure_ascii=False),
    "crlf.jsonl": lambda texts: b"\xef\xbb\xbf" + lines(texts).replace(b"\n", b"\r\n\r\n")[:-4],
    "lines.json": lines,
    "array.json": lambda texts: json.dumps(objects(texts)).encode(),
    "pretty.json": lambda texts: b"\n " + json.dumps(objects(texts), indent=2, ensure_ascii=False).encode() + b"\n",
    "a.parquet": as_parquet,
    "large.parquet": lambda texts: as_parquet(texts, pa.large_string(), compression="zstd", use_dictionary=False),
    "bytes.parquet": lambda texts: as_parquet([text.encode() for text in texts], pa.binary()),
    "stream.arrow": as_arrow,
    "file.arrow": lambda texts: as_arrow(texts, pa.ipc.new_file),
    "dictionary.arrow": lambda texts: as_arrow(texts, kind=pa.dictionary(pa.int32(), pa.string())),
    "view.arrow": lambda texts: as_arrow(texts, kind=pa.string_view()),
}
EVERY = [(name, "") for name in FORMATS]
EVERY += [(name, end) for name in ("a.jsonl", "pretty.json", "a.parquet", "file.arrow") for end in COMPRESSIONS if end]


def saved(folder, texts):
    """Write what `datasets.Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (texts[:13], texts[13:]), strict=True):
        (folder / name).write_bytes(as_arrow(part))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "a", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def records(source, **options):
    opened = TextData(source=f"file:{source}", **options).open_source()
    return {split: list(opened.records(split)) for split in SPLITS}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Return the rows of the plain text file."""
    place = tmp_path_factory.mktemp("plain")
    (place / "a.txt").write_bytes("\f".join(PLAIN).encode())
    return rows(place / "a.txt", place / "cache")


def rows(source, cache):
    data = TextData(source=f"file:{source}", sequence_length=32, vocab_size=300, shard_size=9)
    data.prepare(cache)
    examples = {split: data.examples(split, cache) for split in SPLITS}
    kept = {split: [examples[split][i]["tokens"].tolist() for i in range(len(examples[split]))] for split in SPLITS}
    return data.fingerprint(cache), kept


@pytest.mark.parametrize(("name", "end"), EVERY)
def test_every_format_gives_the_rows_of_the_plain_text(tmp_path, original, name, end, monkeypatch):
    """Faults: a format changes, loses or adds text, or puts it in another order; a compression ends after its first
    frame; records that span two reads are cut."""
    monkeypatch.setattr(files, "_CHUNK", 1_000)
    path = tmp_path / f"{name}{end.removeprefix(' frames')}"
    path.write_bytes(COMPRESSIONS[end](FORMATS[name](PLAIN)))
    assert rows(path, tmp_path / "cache") == original


def test_saved_data_sets_give_the_rows_of_the_plain_text(tmp_path, original):
    """Faults: the folder that `datasets` saves matches no file; its files are read in another order."""
    saved(tmp_path / "saved", PLAIN)
    assert rows(tmp_path / "saved", tmp_path / "cache") == original


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [3, 7, 10**6])
def test_texts_that_no_plain_file_holds(tmp_path, name, size, monkeypatch):
    """Faults: characters that separate documents or records elsewhere cut a text; a mark or a newline at its end is
    dropped; an empty text becomes a document; the end of a read cuts an escape or a character in two."""
    monkeypatch.setattr(files, "_CHUNK", size)
    texts = [*HARD, "", " \n\f", *PLAIN[:3]]
    (tmp_path / name).write_bytes(FORMATS[name](texts))
    found = records(tmp_path / name)
    assert sorted(found["train"] + found["heldout"]) == sorted(HARD + PLAIN[:3])
    assert found["train"] == [text for text in texts if text in found["train"]]


BROKEN = {
    '{"id": 3}': "has no data.text_key='text', but 'id'",
    '{"text": null}': "'text' is null and not text",
    '{"text": ["a"]}': "'text' is a list and not text",
    '{"text": 7}': "'text' is a int and not text",
    '{"text": "a\\ud83d b"}': "'text' is not UTF-8 at character 1",
    '["text"]': "a list and not an object",
    '"text"': "a str and not an object",
}
BROKEN_LINES = {
    '{"text": "a"': "not JSON (Expecting ',' delimiter: line 1 column 13 (char 12))",
    '{"text": "a\fb"}': "not JSON (Invalid control character at: line 1 column 12 (char 11))",
    "[" * 100_000: "not JSON (",
    '{"text": ' + "9" * 5_000 + "}": "not JSON (",
    b'{"text": "a\xff"}': "not UTF-8 at byte 11",
}


@pytest.mark.parametrize("name", ["a.jsonl", "lines.json", "array.json"])
@pytest.mark.parametrize("bad", [*BROKEN, *BROKEN_LINES], ids=lambda bad: str(bad)[:20])
def test_a_broken_record_is_malformed(tmp_path, name, bad):
    """Faults: a record without the text is lost without a word; it ends the run with a traceback; it loses others."""
    if name == "array.json" and bad in BROKEN_LINES and not isinstance(bad, bytes):
        pytest.skip("what follows cannot be found")
    content = lines(PLAIN).splitlines()
    content.insert(20, bad if isinstance(bad, bytes) else bad.encode())
    whole = b"[" + b",".join(content) + b"]" if name == "array.json" else b"\n".join(content)
    (tmp_path / name).write_bytes(whole)
    found = records(tmp_path / name)
    (malformed,) = [each for each in found["train"] if isinstance(each, Malformed)]
    reason = {**BROKEN, **BROKEN_LINES}[bad]
    if name == "array.json" and bad not in BROKEN:
        reason = "'text' is not UTF-8 at character 1"
    place = "record" if name == "array.json" else "line"
    assert str(malformed).startswith(f"{tmp_path / name}, {place} 21: {reason}")
    assert sorted(each for each in [*found["train"], *found["heldout"]] if each != malformed) == sorted(PLAIN)


@pytest.mark.parametrize("write", [as_parquet, as_arrow])
def test_a_text_that_is_missing_or_not_utf_8_is_malformed(tmp_path, write):
    """Fault: one bad value of a column loses the file."""
    (tmp_path / "a.parquet").write_bytes(write([text.encode() for text in PLAIN], kind=pa.binary()))
    texts = [text.encode() for text in PLAIN]
    texts[3], texts[30] = None, b"a\xff"
    name = "a.parquet" if write is as_parquet else "a.arrow"
    (tmp_path / name).write_bytes(write(texts, kind=pa.binary()))
    found = records(tmp_path / name)
    malformed = [str(each) for each in found["train"] if isinstance(each, Malformed)]
    reasons = {4: "'text' is null and not text", 31: "'text' is not UTF-8 at byte 1"}
    assert malformed == [f"{tmp_path / name}, row {row}: {reason}" for row, reason in reasons.items()]
    texts = [each for split in SPLITS for each in found[split] if not isinstance(each, Malformed)]
    assert sorted(texts) == sorted(text for i, text in enumerate(PLAIN) if i not in (3, 30))


@pytest.mark.parametrize(
    "content", [b"[", b"[{}", b'[{"text": "a"}, {"text": "b"]', b'[{"text": "a"},]', b"[] []", b'[{"text": "a"} {}]']
)
def test_a_broken_array_is_one_line(tmp_path, content):
    """Fault: the records after a broken one are lost without a word, or are a traceback."""
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: is not a JSON array of objects from record \d on\. Repair"):
        list(fields.read(epath.Path(tmp_path / "a.json"), {"text_key": "text"}))


def test_unusable_files_are_one_line(tmp_path):
    """Faults: a traceback of pyarrow; half a file is trained on."""
    whole = as_parquet(PLAIN)
    bent = bytearray(as_arrow(PLAIN))
    bent[40:60] = b"\xff" * 20
    cases = {
        "a.parquet": (whole[:-9], {}, "a.parquet: cannot be read"),
        "b.parquet": (
            whole,
            {"text_key": "body"},
            "data.text_key='body': .*has no such column. Use one of 'id', 'text'",
        ),
        "c.parquet": (whole, {"text_key": "id"}, "data.text_key='id': the column of .* holds int64 and not text"),
        "d.parquet": (whole, {"text_key": "text.a"}, "data.text_key='text.a': .* has no such column"),
        "e.arrow": (bytes(bent), {}, "e.arrow: cannot be read"),
        "f.jsonl.zst": (zstd(lines(PLAIN))[:-9], {}, "f.jsonl.zst: cannot be read"),
        "g.jsonl.bz2": (bz2.compress(lines(PLAIN))[:-9], {}, "g.jsonl.bz2: cannot be read"),
        "h.parquet.gz": (gzip.compress(whole)[:-9], {}, "h.parquet.gz: cannot be read"),
    }
    for name, (content, options, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            records(tmp_path / name, **options)
        assert "\n" not in str(caught.value)


def test_keys_of_fields_inside_fields(tmp_path):
    """Faults: a key with a dot is only a path, or only a name; pairs of one field need a conversion."""
    pairs = [{"en": f"text {i}", "fr": f"texte {i}"} for i in range(20)]
    rows = [{"translation": pair, "a.b": pair["en"]} for pair in pairs]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert sum(map(len, records(tmp_path / name, text_key="a.b").values())) == 20
        keys = {"source_key": "translation.en", "target_key": "translation.fr"}
        source = PairData(source=f"file:{tmp_path / name}", **keys).open_source()
        found = [pair for split in SPLITS for pair in source.records(split)]
        assert sorted(found) == sorted((pair["en"], pair["fr"]) for pair in pairs)


def test_the_splits_of_a_saved_data_set(tmp_path):
    """Faults: its held-out split is trained on; a missing split is a traceback."""
    folder = tmp_path / "[v1] saved"
    saved(folder / "train", PLAIN[:30])
    saved(folder / "test", PLAIN[30:])
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert records(folder, heldout_split="test") == {"train": PLAIN[:30], "heldout": PLAIN[30:]}
    with pytest.raises(
        UserError, match=r"heldout_split='validation': .* 'train', 'test'\. Name .*or write file:.*train to"
    ):
        records(folder)
    with pytest.raises(UserError, match=r"is also data\.train_split"):
        records(folder, heldout_split="train")
    masked = MaskedTextData(source=f"file:{folder}", train_split="train", heldout_split="test").open_source()
    assert list(masked.records("heldout")) == PLAIN[30:]
    state = folder / "train" / "state.json"
    for content in ("{", "{}", '{"_data_files": [{"filename": "../a.arrow"}]}'):
        state.write_text(content)
        with pytest.raises(UserError, match=re.escape(str(state))):
            records(folder, heldout_split="test")


def test_memory_is_bounded(tmp_path):
    """Faults: a file, or a row group of a Parquet file, is held whole."""
    texts = [np.random.default_rng(i).bytes(2_000).hex() for i in range(4_000)]
    for name in ("a.jsonl", "array.json", "a.parquet", "file.arrow"):
        if name == "a.parquet":
            pa.parquet.write_table(as_table(texts), tmp_path / name)  # one row group of 16 MB
        else:
            (tmp_path / name).write_bytes(FORMATS[name](texts))
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        most = count = 0
        for _ in fields.read(epath.Path(tmp_path / name), {"text_key": "text"}):
            most, count = max(most, pa.total_allocated_bytes() - before), count + 1
        assert count == len(texts)
        assert most + tracemalloc.get_traced_memory()[1] < 20e6, name
        tracemalloc.stop()
