import dataclasses
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tokenizers import Tokenizer

from shampax.framework.base.errors import UserError
from shampax.framework.data import samples
from shampax.framework.data.reading import files
from shampax.framework.data.reading.malformed import Malformed
from shampax.framework.data.text import TextData, documents, tokenizer
from shampax.framework.data.text.tokenizer import train_tokenizer
from shampax.framework.dataset import SPLITS

TEXTS = [f"Document {i}: {'naïve 漢字 text ' * (i % 5 + 1)}🙂" for i in range(40)]


def prepare_tfds(directory, name, config, version, splits, file_format="array_record"):
    """Write `splits` (name -> texts) as a tfds data set under a real name, offline."""
    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version(version)
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

            def _info(self):
                features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "url": tfds.features.Text()})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(texts) for split, texts in splits.items()}

            def _generate_examples(self, texts):
                for index, text in enumerate(texts):
                    yield index, {"text": text, "url": f"example.org/{index}"}

        Builder.name = name
        tfds.disable_progress_bar()
        options = {"config": config} if config else {}
        Builder(data_dir=directory, file_format=file_format, **options).download_and_prepare()


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    prepare_tfds(directory, "lm1b", None, "1.1.0", {"train": TEXTS[:30], "test": TEXTS[30:]})
    prepare_tfds(directory, "c4", "en", "3.1.0", {"train": TEXTS[:30], "validation": TEXTS[30:]})
    return directory


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Prepare the vendored sample with a small vocabulary."""
    cache = tmp_path_factory.mktemp("cache")
    data = TextData(vocab_size=512, sequence_length=128)
    data.prepare(cache)
    return data, cache


def decoded(data, cache, split):
    """Return the documents of a split, joined from its rows."""
    tokenizer, rows = data.load_tokenizer(cache), data.examples(split, cache)
    targets = []
    for i in range(len(rows)):
        row = rows[i]
        segments = row["segments"]
        targets.extend(row["tokens"][1:][(segments[1:] == segments[:-1]) & (segments[1:] > 0)].tolist())
    assert targets[-1] == 0
    ends = np.flatnonzero(np.array(targets) == 0)
    starts = [0, *(ends[:-1] + 1)]
    return [tokenizer.decode(targets[start:end]) for start, end in zip(starts, ends, strict=True)]


def test_sample_splits(sample):
    """Faults: packing loses text; a document is split at the wrong separator; a held-out article is in training."""
    data, cache = sample
    everything = [text for split in ("train", "heldout") for text in data.open_source().records(split)]
    train, heldout = decoded(data, cache, "train"), decoded(data, cache, "heldout")
    assert (len(train), len(heldout)) == (96, 10)
    assert train + heldout == everything
    assert not set(train) & set(heldout)
    assert train[0].startswith("Anarchism\n")
    assert not any("\f" in text or text.endswith("\n") for text in train)


def test_tokenizer_sees_training_documents_only(sample):
    """Fault: merges are learnt from held-out text, which lowers bits per character."""
    data, cache = sample
    expected = train_tokenizer(data.open_source().records("train"), data.vocab_size)
    assert data.load_tokenizer(cache).get_vocab() == expected.get_vocab()


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_bytes_add_up_to_the_text(sample, split):
    """Fault: bits per byte use a wrong number of bytes (split pieces, ends, characters of several bytes)."""
    data, cache = sample
    rows = data.examples(split, cache)
    counted = sum(int(rows[i]["bytes"]) for i in range(len(rows)))
    assert counted == sum(len(text.encode()) for text in data.open_source().records(split))


def test_cache_is_used_and_stale_caches_are_not(tmp_path, capfd):
    """Faults: every start packs again; old rows are used for new settings or changed files."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i, text in enumerate(TEXTS):
        (texts / f"{i:03}.txt").write_text(text)
    cache = tmp_path / "cache"
    data = TextData(source=f"file:{texts}/*.txt", sequence_length=32, vocab_size=300)
    data.prepare(cache)
    assert "prepared train: 36 documents" in capfd.readouterr().err
    stamps = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    data.prepare(cache)
    assert stamps == {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    heldout = decoded(data, cache, "heldout")
    assert decoded(data, cache, "train") == [text for text in TEXTS if text not in heldout]
    changed = heldout[0] + "!"
    (texts / f"{TEXTS.index(heldout[0]):03}.txt").write_text(changed)
    with pytest.raises(UserError, match="call prepare"):
        data.examples("heldout", cache)
    data.prepare(cache)
    everything = decoded(data, cache, "heldout") + decoded(data, cache, "train")
    assert changed in everything and set(everything) - {changed} == set(TEXTS) - {heldout[0]}
    longer = TextData(source=data.source, sequence_length=64, vocab_size=300)
    longer.prepare(cache)
    assert longer.examples("train", cache)[0]["tokens"].shape == (65,)
    assert len(list(cache.glob("tokenizer-*.json"))) == 2  # one from before the change, and one for both lengths


def test_form_feeds_separate_documents_in_a_file(tmp_path):
    """Faults: several documents of a file are one; the separator is kept as text."""
    (tmp_path / "a.txt").write_bytes("\n\f".join(TEXTS[:15]).encode())
    (tmp_path / "b.txt").write_bytes("\f".join(TEXTS[15:]).encode() + b"\n\f")
    train, heldout = (list(TextData(source=f"file:{tmp_path}/*.txt").open_source().records(split)) for split in SPLITS)
    assert train == [text for text in TEXTS if text not in heldout]
    assert heldout == [text for text in TEXTS if text not in train]


@pytest.mark.parametrize("content", ["a\fb", "a\n\f\r\n\fb\r\f", "\f\f", "a\n", "a\n\r\fb\r\r\n\fc" * 3, ""])
def test_documents_do_not_depend_on_where_a_read_ends(tmp_path, monkeypatch, content):
    """Faults: a separator that spans two reads is missed; a newline between documents is kept."""
    path = tmp_path / "a.txt"
    content += "0\f1\f2\f3\f4\f5\f6\f7\f8\f9\f"
    path.write_bytes(content.encode())
    expected = [text for text in re.split("\r?\n?\f", content) if text]
    for size in (1, 2, 3, 1000):
        monkeypatch.setattr(files, "_CHUNK", size)
        source = TextData(source=f"file:{path}").open_source()
        found = [*source.records("train"), *source.records("heldout")]
        assert sorted(found) == sorted(expected)


def test_an_endless_text_is_malformed(tmp_path, monkeypatch):
    """Fault: a binary image read as text exhausts the memory."""
    monkeypatch.setattr(documents, "_LONGEST_DOCUMENT", 9)
    (tmp_path / "a.txt").write_text("0\f1\f2\f3\f4\f5\f6\f7\f8\f9\f123456789x\f12345678\f")
    source = TextData(source=f"file:{tmp_path}/a.txt").open_source()
    found = [record for split in SPLITS for record in source.records(split) if len(str(record)) > 1]
    assert sorted(found, key=str) == [Malformed(f"{tmp_path}/a.txt, document 11", "more than 9 bytes"), "12345678"]


def bad_documents(folder):
    """Write 40 documents in one file. Documents 7, 10 and 25 are not UTF-8."""
    parts = [text.encode() for text in TEXTS]
    for index in (6, 9, 24):
        parts[index] = parts[index][:5] + b"\xff" + parts[index][5:]
    (folder / "a.txt").write_bytes(b"\f".join(parts))
    return f"file:{folder}/*.txt"


def test_malformed_documents_are_skipped_up_to_a_limit(tmp_path, capfd):
    """Faults: one bad document loses its whole file, moves others to another split, or is skipped without a message."""
    source, cache = bad_documents(tmp_path), tmp_path / "cache"
    fields = {"source": source, "sequence_length": 32, "vocab_size": 300}
    with pytest.raises(UserError, match=r"max_malformed=2: 3 records are malformed .*document 7: .*document 25:"):
        TextData(**fields, max_malformed=2).prepare(cache)
    assert not cache.exists()
    data = TextData(**fields, max_malformed=3)
    data.prepare(cache)
    err = capfd.readouterr().err
    assert re.search(r"prepared train: 33 documents, .* rows", err)
    assert re.search(r"document 10: not UTF-8 at byte 5; .*, skipped", err)
    usable, heldout = [text for i, text in enumerate(TEXTS) if i not in (6, 9, 24)], decoded(data, cache, "heldout")
    assert decoded(data, cache, "train") == [text for text in usable if text not in heldout]
    assert heldout == [text for text in usable if text in heldout]
    (stamp,) = cache.glob("rows-*/manifest.json")
    totals = json.loads(stamp.read_text())["splits"]
    assert [totals[split]["malformed"]["count"] for split in ("train", "heldout")] == [3, 0]


def test_prepared_rows_record_skipped_documents(tmp_path, capfd):
    """Faults: the limit applies only when rows are written; skipped documents are forgotten after that."""
    fields = {"source": bad_documents(tmp_path), "sequence_length": 32, "vocab_size": 300}
    TextData(**fields, max_malformed=3).prepare(tmp_path / "cache")
    capfd.readouterr()
    TextData(**fields, max_malformed=5).prepare(tmp_path / "cache")
    assert "train documents: 3 records are malformed (" in capfd.readouterr().err
    assert len(list((tmp_path / "cache").glob("rows-*"))) == 1
    with pytest.raises(UserError, match=r"max_malformed=0: 3 records are malformed .*document 7"):
        TextData(**fields).prepare(tmp_path / "cache")


def test_documents_of_a_tsv_column(tmp_path):
    """Faults: another column is read; all rows are one document; a row without the column ends the run."""
    lines = [f"{i}\t{text}\t" for i, text in enumerate(TEXTS)]
    lines[3] = "no columns"
    (tmp_path / "a.tsv.xz").write_bytes(lzma.compress("\n".join(lines).encode()))
    data = TextData(source=f"file:{tmp_path}/*", tsv_column=2, sequence_length=32, vocab_size=300, max_malformed=1)
    data.prepare(tmp_path / "cache")
    train, heldout = (decoded(data, tmp_path / "cache", split) for split in SPLITS)
    assert train == [text for i, text in enumerate(TEXTS) if text not in heldout and i != 3]
    other = TextData(source=data.source, tsv_column=1, sequence_length=32, vocab_size=300, max_malformed=1)
    with pytest.raises(UserError, match="call prepare"):
        other.examples("train", tmp_path / "cache")


def test_malformed_documents_of_a_tfds_set_are_named(tmp_path):
    """Faults: damaged data or text that is not UTF-8 is a traceback, or loses other documents."""
    texts = [b"bad \xff" if i == 2 else text.encode() for i, text in enumerate(TEXTS)]
    prepare_tfds(tmp_path, "lm1b", None, "1.1.0", {"train": texts[:30], "test": texts[30:]})
    splits = {"train_split": "train", "heldout_split": "test"}
    data = TextData(source="tfds:lm1b:1.1.0", data_dir=str(tmp_path), **splits)
    source = data.open_source()
    whole = list(source.records("train"))
    (index,) = [i for i, each in enumerate(whole) if not isinstance(each, str)]
    assert str(whole[index]) == f"tfds:lm1b:1.1.0 split 'train', row {index + 1}: not UTF-8 at byte 4"
    (shard,) = (tmp_path / "lm1b" / "1.1.0").glob("*train*")
    content = bytearray(shard.read_bytes())
    content[1000] ^= 0xFF
    shard.write_bytes(content)
    again = list(source.records("train"))
    (damaged,) = [i for i in range(30) if again[i] != whole[i]]
    message = f"tfds:lm1b:1.1.0 split 'train', row {damaged + 1}: Corrupted"
    assert str(again[damaged]).startswith(message)
    content[80] ^= 0xFF
    shard.write_bytes(content)
    source = data.open_source()  # the first is damaged too
    assert [i for i, each in enumerate(source.records("train")) if each != whole[i]] == [0, damaged]
    shard.unlink()
    with pytest.raises(UserError, match=r"'train' of tfds:lm1b:1\.1\.0: cannot be read any further"):
        list(source.records("train"))


def test_max_records(tmp_path, tfds_dir):
    """Fault: packing or tokenizer training ignores the limit."""
    data = TextData(source="tfds:c4/en:3.1.0", data_dir=str(tfds_dir), vocab_size=300, max_records=3)
    data.prepare(tmp_path)
    assert len(decoded(data, tmp_path, "train")) == len(decoded(data, tmp_path, "heldout")) == 3


READ = """
import json, pathlib, sys
from shampax.framework.data.pipeline import Batches
from shampax.framework.data.reading.malformed import Malformed
from shampax.framework.data.text import TextData
source, data_dir, heldout, cache = sys.argv[1:]
data = TextData(source=source, data_dir=data_dir, heldout_split=heldout, sequence_length=32, vocab_size=300)
data.prepare(pathlib.Path(cache))
rows = data.examples("train", pathlib.Path(cache))
batches = Batches(rows, seed=1, global_batch_size=4, rows=range(4))
print(json.dumps({"shape": next(batches.from_step(3))["tokens"].shape, "tensorflow": "tensorflow" in sys.modules}))
"""


@pytest.mark.parametrize(("source", "heldout"), [("tfds:lm1b:1.1.0", "test"), ("tfds:c4/en:3.1.0", "validation")])
def test_prepared_tfds_sets_are_read_without_tensorflow(tmp_path, tfds_dir, source, heldout):
    """Faults: real names of data do not open; splits are swapped; TensorFlow's import adds 2.5 s to the input path."""
    command = [sys.executable, "-c", READ, source, str(tfds_dir), heldout, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"shape": [4, 33], "tensorflow": False}
    data = TextData(source=source, data_dir=str(tfds_dir), heldout_split=heldout, sequence_length=32, vocab_size=300)
    assert sorted(decoded(data, tmp_path, "train")) == sorted(TEXTS[:30])
    assert sorted(decoded(data, tmp_path, "heldout")) == sorted(TEXTS[30:])


def test_the_tokenizer_is_loaded_once(tmp_path, monkeypatch):
    """Fault: a run loads its tokenizer four times."""
    calls = []

    class Counted:
        def __new__(cls, *arguments):
            return Tokenizer(*arguments)

        @staticmethod
        def from_buffer(content):
            calls.append(1)
            return Tokenizer.from_buffer(content)

    monkeypatch.setattr(tokenizer, "Tokenizer", Counted)
    (tmp_path / "a.txt").write_text("\f".join(TEXTS))
    data = TextData(source=f"file:{tmp_path}/a.txt", vocab_size=301, sequence_length=16)
    data.prepare(tmp_path / "cache")
    for split in SPLITS:
        data.examples(split, tmp_path / "cache")
    assert len(calls) == 1


def test_given_tokenizer(sample, tmp_path):
    """Faults: a tokenizer file is ignored, or replaced without packing the rows again."""
    data, cache = sample
    (path,) = cache.glob("tokenizer-*.json")
    given = TextData(vocab_size=600, sequence_length=128, tokenizer=str(path))
    given.prepare(tmp_path / "cache")
    same = given.examples("heldout", tmp_path / "cache")[5]["tokens"]
    assert same.tolist() == data.examples("heldout", cache)[5]["tokens"].tolist()
    assert list((tmp_path / "cache").glob("tokenizer-*")) == []


def test_a_further_held_out_set_has_the_tokens_of_the_training_data(sample, tmp_path):
    """Fault: a further held-out set learns a tokenizer of its own, whose tokens mean nothing to the model."""
    data, cache = sample
    (path,) = cache.glob("tokenizer-*.json")
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    other = dataclasses.replace(data, source=f"file:{tmp_path}/*.txt").beside(data, cache)
    other.prepare(tmp_path / "cache")
    assert other.tokenizer == str(path) and not list((tmp_path / "cache").glob("tokenizer-*"))
    assert set(decoded(other, tmp_path / "cache", "heldout")) < set(TEXTS)


def test_unusable_sources_are_one_line_and_write_nothing(tmp_path, tfds_dir):
    """Fault: a wrong path or name is found late, with a traceback, or after files were written."""
    few = tmp_path / "few"
    few.mkdir()
    (few / "a.txt").write_text("one document")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.txt").write_bytes(b"".join(b"text %i\f" % i for i in range(12)) + b"\xff\xfe")
    (bad / "a.tsv").write_text("text\n" * 12)
    here = {"data_dir": str(tfds_dir)}
    lm1b = {"source": "tfds:lm1b:1.1.0", "heldout_split": "test", **here}
    cases = [
        ({"source": f"file:{tmp_path}/none/*.txt"}, "none/.* matches no file"),
        ({"source": f"file:{few}"}, r"write file:.*few/\*\.txt"),
        ({"source": f"file:{few}/*.txt"}, "have 1 different records, and two splits need at least 10"),
        (
            {"source": f"file:{bad}/*.txt"},
            r"max_malformed=0: 1 record is malformed .*bad/a.txt, document 13: not UTF-8 at byte 0",
        ),
        ({"source": f"file:{bad}/*.tsv", "tsv_column": 2}, "data.tsv_column=2: but .*bad/a.tsv has 1 columns"),
        ({"source": "tfds:lm1b"}, "has no version"),
        ({"source": "tfds:lm1b:9.9.9", **here}, "lm1b/9.9.9.*data.data_dir.*tfds build lm1b"),
        (
            {**lm1b, "heldout_split": "validation"},
            "data.heldout_split='validation': no such split .* Use one of test, train",
        ),
        ({**lm1b, "text_key": "article"}, "data.text_key='article': no such feature .* Use one of text, url"),
        ({**lm1b, "heldout_split": "train[90%:]"}, "share examples"),
        ({"tokenizer": f"{tmp_path}/none.json"}, "none.json: cannot be read"),
    ]
    for fields, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            TextData(**fields).prepare(tmp_path / "cache")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_tfds_sets_without_random_access_or_files_are_refused(tmp_path):
    """Fault: a TFRecord set or a missing shard fails inside tfds after packing has begun."""
    prepare_tfds(tmp_path, "lm1b", None, "1.1.0", {"train": TEXTS[:30], "test": TEXTS[30:]})
    data = TextData(source="tfds:lm1b:1.1.0", data_dir=str(tmp_path), heldout_split="test", vocab_size=300)
    (shard,) = (tmp_path / "lm1b" / "1.1.0").glob("*test*")
    shard.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        data.prepare(tmp_path / "cache")
    info = tmp_path / "lm1b" / "1.1.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"tfrecord form.*--file_format=array_record"):
        data.prepare(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_samples_are_those_of_the_notice():
    """Fault: results are of another text than the notice describes."""
    folder = Path(samples.__file__).parent
    files = sorted(path.name for path in folder.glob("*.xz"))
    notice = (folder / "LICENSES.md").read_text()
    assert len(files) == 6 and all(f"{samples.sha256(file)}" in notice for file in files)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "wiki"}, "sample:enwiki"),
        ({"source": "sample:dewiki"}, "sample:enwiki"),
        ({"heldout_fraction": 0.0}, "at least 1e-09 and at most 0.999"),
        ({"sequence_length": 0}, "at least 1"),
        ({"vocab_size": 256}, "256: must be at least 257"),
        ({"max_records": -1}, "at least 0"),
        ({"max_malformed": -1}, "at least 0"),
        ({"tsv_column": 0}, "at least 1"),
    ],
)
def test_fields_are_checked(fields, message):
    """Fault: an invalid value is accepted at construction and fails in the middle of a run."""
    with pytest.raises(ValueError, match=message):
        TextData(**fields)
