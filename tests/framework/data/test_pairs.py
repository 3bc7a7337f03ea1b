import itertools
import json
import lzma
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath
from wmt14 import prepare_wmt14

from shampax.framework.base.errors import UserError
from shampax.framework.data import samples
from shampax.framework.data.pairs import PairData
from shampax.framework.data.pairs.packing import Packer
from shampax.framework.data.pipeline import Batches
from shampax.framework.data.reading import shards
from shampax.framework.data.reading.malformed import Malformed
from shampax.framework.data.text.tokenizer import train_tokenizer

PAIRS = [
    (f"Sentence {i}: naïve words. " * (i % 4 + 1), f"Phrase {i} : mots naïfs 漢字 🙂. " * (i % 3 + 1))
    for i in range(40)
]
SMALL = {"vocab_size": 300, "source_length": 200, "target_length": 200}


@pytest.fixture(scope="module")
def wmt14(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    splits = {"train": PAIRS[:30], "validation": PAIRS[30:34], "test": PAIRS[34:]}
    # The set's first language is the target here, not the source.
    prepare_wmt14(directory, "fr-en", {name: [pair[::-1] for pair in pairs] for name, pairs in splits.items()})
    return directory


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Prepare the vendored sample."""
    cache = tmp_path_factory.mktemp("cache")
    data = PairData(vocab_size=1024, source_length=144, target_length=144)
    data.prepare(cache)
    return data, cache


def decoded(data, cache, split):
    """Return the pairs of a split, decoded from its rows."""
    decode, rows = data.decoder(cache), data.examples(split, cache)
    pairs = []
    for index in range(len(rows)):
        row = rows[index]
        for segment in range(1, row["source_segments"].max() + 1):
            source = row["source"][row["source_segments"] == segment]
            target = row["target"][row["target_segments"] == segment]
            assert source[-1] == target[0] == target[-1] == 0
            pairs.append((decode(source), decode(target[1:])))
    return pairs


def verses():
    """Return (book, chapter, English, French) of every verse of the sample."""
    for line in samples.read("web-lsg-nt.en-fr.tsv.xz").decode().splitlines():
        place, source, target = line.split("\t")
        yield *map(int, place.split(".")[:2]), source, target


def test_sample_is_split_by_chapter_and_repeated_sources_are_dropped(sample):
    """Faults: verses of one chapter are in both splits; languages are swapped; held-out sources are trained on."""
    data, cache = sample
    chapters = {group: [] for group in range(20)}
    train = []
    for book, chapter, *pair in verses():
        group = (7 * book + chapter) % 20
        chapters[group].append(tuple(pair))
        if group > 1:
            train.append(tuple(pair))
    assert [len(chapters[0]), len(chapters[1]), len(train)] == [361, 426, 7170]
    trained_on = {source for source, _ in train}
    heldout = decoded(data, cache, "heldout")
    assert heldout == [pair for pair in chapters[1] if pair[0] not in trained_on]
    assert len(heldout) == 424
    assert decoded(data, cache, "train") == train
    validation = PairData(heldout_split="validation").open_source()
    assert list(validation.records("heldout")) == [pair for pair in chapters[0] if pair[0] not in trained_on]
    assert list(validation.records("train")) == train
    assert sum(source in trained_on for group in (0, 1) for source, _ in chapters[group]) == 6


def test_rows_are_filled_in_order_and_each_pair_is_whole(sample):
    """Faults: a row has room for another pair; a pair is cut; segments differ between source and target."""
    data, cache = sample
    rows = data.examples("train", cache)
    spec = data.spec()
    packer = Packer(144, 144, 0, 1024)
    before = None
    for index in range(0, 200):
        row = rows[index]
        assert {name: (array.shape, array.dtype) for name, array in row.items()} == {
            name: (each.shape, each.dtype) for name, each in spec.items()
        }
        sizes = {}
        for side in ("source", "target"):
            segments = row[f"{side}_segments"]
            sizes[side] = [int((segments == number).sum()) for number in range(1, segments.max() + 1)]
            filled = [(number, at) for number, size in enumerate(sizes[side], start=1) for at in range(size)]
            expected = np.zeros((len(segments), 2), int)
            expected[: len(filled)] = filled
            np.testing.assert_array_equal(segments, expected[:, 0])
            np.testing.assert_array_equal(row[f"{side}_positions"][: len(filled)], expected[: len(filled), 1])
            assert (row[side][len(filled) :] == 0).all()
        pairs = len(sizes["source"])
        assert pairs == len(sizes["target"]) > 0
        if before:  # the first pair of this row does not fit into the previous row
            source, target = before["source"] + sizes["source"][:1], before["target"] + sizes["target"][:1]
            assert not packer.holds(len(source), sum(source) - len(source), sum(target) - 2 * len(target))
        before = sizes


def test_one_pair_per_row(sample):
    """Faults: held-out rows have several pairs, of which only one is translated; the limit is not respected."""
    data, cache = sample
    heldout = data.examples("heldout", cache)
    assert {int(heldout[index]["target_segments"].max()) for index in range(len(heldout))} == {1}
    single = PairData(vocab_size=1024, source_length=144, target_length=144, pairs_per_row=1)
    single.prepare(cache)
    assert len(single.examples("train", cache)) == 7170
    assert decoded(single, cache, "train") == decoded(data, cache, "train")
    assert len(list(cache.glob("tokenizer-*.json"))) == 1


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(0, [[10, 11], [12, 13], [14, 15, 16], [17]]), (2, [[10, 11], [12, 13], [14, 15], [16, 17]])],
)
def test_pairs_that_just_fit(tmp_path, limit, expected):
    """Faults: a row that is exactly full is off by one, on either side; the limit of pairs is ignored."""
    sizes = [(3, 2), (1, 1), (1, 2), (1, 2), (1, 1), (1, 1), (1, 1), (3, 3)]
    pairs = [(np.full(s, 10 + i, np.int32), np.full(t, 20 + i, np.int32)) for i, (s, t) in enumerate(sizes)]
    packer = Packer(6, 8, limit, 300)  # targets take one slot less than their tokens with both ends
    written = shards.write(epath.Path(tmp_path / "a"), packer.pack(iter(pairs)))
    count, content = written["rows"], written["content"]
    rows = shards.ShardRows({epath.Path(tmp_path / "a"): count}, packer, 0, count)
    assert [sorted({*rows[i]["source"].tolist()} - {0}) for i in range(len(rows))] == expected
    assert count == len(rows)
    assert rows[0]["source"].tolist() == [10, 10, 10, 0, 11, 0]
    assert rows[0]["target"].tolist() == [0, 20, 20, 0, 0, 21, 0, 0, 0]
    assert rows[0]["target_segments"].tolist() == [1, 1, 1, 1, 2, 2, 2, 0, 0]
    assert shards.write(epath.Path(tmp_path / "b"), packer.pack(iter(pairs)))["content"] == content
    assert shards.write(epath.Path(tmp_path / "c"), packer.pack(iter(pairs[::-1])))["content"] != content
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_tokenizer_is_trained_on_both_languages_of_the_training_pairs(sample):
    """Fault: the vocabulary is of one language, or merges are learnt from held-out text."""
    data, cache = sample
    pairs = data.open_source().records("train")
    expected = train_tokenizer(itertools.chain.from_iterable(pairs), 1024)
    assert data.load_tokenizer(cache).get_vocab() == expected.get_vocab()


def write_tsv(path, pairs):
    path.write_text("".join(f"{i}\t{target}\t{source}\n" for i, (source, target) in enumerate(pairs)))
    return f"file:{path}"


def test_columns_of_tsv_files(tmp_path, capfd):
    """Faults: other columns are read; malformed or empty rows move others to another split; dropped rows are not
    reported."""
    pairs = list(PAIRS)
    pairs[3], pairs[12], pairs[29] = ("", "empty"), ("long " * 200, "long"), PAIRS[0]
    pairs[4], pairs[6] = ("blank", " \u3000 "), ("\u2003", "blank")
    source = write_tsv(tmp_path / "a.tsv", pairs)
    lines = (tmp_path / "a.tsv").read_bytes().splitlines(keepends=True)
    lines[5] = b"5\t\xff\tbad\n"
    (tmp_path / "a.tsv.xz").write_bytes(lzma.compress(b"".join(lines)))
    data = PairData(source=f"{source}.xz", source_column=3, target_column=2, max_malformed=1, **SMALL)
    data.prepare(tmp_path / "cache")
    err = capfd.readouterr().err
    assert "train pairs: 1 record is malformed" in err and "a.tsv.xz, row 6: not UTF-8" in err
    assert sum(map(int, re.findall(r"(\d+) with an empty side", err))) == 3
    assert re.search("train pairs: .*1 too long for a row; dropped", err)
    heldout = decoded(data, tmp_path / "cache", "heldout")
    usable = [pair for i, pair in enumerate(pairs) if i not in (3, 4, 5, 6, 12)]
    assert decoded(data, tmp_path / "cache", "train") == [pair for pair in usable if pair not in heldout]
    assert heldout == [pair for pair in usable if pair in heldout] and heldout
    data.prepare(tmp_path / "cache")
    assert "1 too long for a row; dropped" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"max_malformed=0: 1 record is malformed .*row 6"):
        PairData(source=f"{source}.xz", source_column=3, target_column=2, **SMALL).prepare(tmp_path / "cache")
    with pytest.raises(UserError, match=r"data.source_column=4: but .*a.tsv.xz has 3 columns"):
        PairData(source=f"{source}.xz", source_column=4, **SMALL).prepare(tmp_path / "cache")


def test_heldout_pairs_are_never_cut(tmp_path):
    """Fault: BLEU is computed with truncated references or with too few pairs."""
    fields = {"source_column": 3, "target_column": 2, "vocab_size": 300}
    fields["source"] = write_tsv(tmp_path / "a.tsv", PAIRS)
    _, chosen, *_ = PairData(**fields).open_source().records("heldout")
    long = (chosen.source, "mot " * 90)
    write_tsv(tmp_path / "a.tsv", [long if pair == chosen else pair for pair in PAIRS])
    with pytest.raises(UserError, match=r"1 held-out pairs are longer, up to \d+ source and \d+ target") as caught:
        PairData(**fields, source_length=90, target_length=90).prepare(tmp_path / "cache")
    assert list((tmp_path / "cache").glob("rows-*/*")) == []
    longest = [int(word) for word in str(caught.value).split() if word.isdecimal()][2]
    data = PairData(**fields, source_length=90, target_length=longest)
    data.prepare(tmp_path / "cache")
    assert decoded(data, tmp_path / "cache", "heldout")[1] == long


def test_the_fingerprint_depends_on_the_content(tmp_path):
    """Faults: a touched file counts as other data; a changed target does not."""
    fields = {"source_column": 3, "target_column": 2} | SMALL
    prints = []
    for name, pairs in (("a", PAIRS), ("b", PAIRS), ("c", [*PAIRS[:20], (PAIRS[20][0], "autre"), *PAIRS[21:]])):
        data = PairData(source=write_tsv(tmp_path / f"{name}.tsv", pairs), **fields)
        with pytest.raises(UserError, match="call prepare"):
            data.examples("train", tmp_path / "cache")
        data.prepare(tmp_path / "cache")
        prints.append(data.fingerprint(tmp_path / "cache"))
    assert prints[0] == prints[1] != prints[2]


READ = """
import json, pathlib, sys
from shampax.framework.data.pairs import PairData
from shampax.framework.data.pipeline import Batches
data_dir, cache = sys.argv[1], pathlib.Path(sys.argv[2])
data = PairData(source="tfds:wmt14_translate/fr-en:1.0.0", data_dir=data_dir, vocab_size=300, source_length=200,
    target_length=200)
data.prepare(cache)
batches = Batches(data.examples("train", cache), seed=1, global_batch_size=4, rows=range(4))
print(json.dumps({"shape": next(batches.from_step(3))["target"].shape, "tensorflow": "tensorflow" in sys.modules}))
"""


def test_wmt14_is_read_by_the_names_of_its_features(wmt14, tmp_path):
    """Faults: the source is French because the set has it first; another split is read; TensorFlow is in the input
    path."""
    command = [sys.executable, "-c", READ, str(wmt14), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"shape": [4, 201], "tensorflow": False}
    fields = {"source": "tfds:wmt14_translate/fr-en:1.0.0", "data_dir": str(wmt14)} | SMALL
    data = PairData(**fields)
    assert sorted(decoded(data, tmp_path, "train")) == sorted(PAIRS[:30])
    assert sorted(decoded(data, tmp_path, "heldout")) == sorted(PAIRS[34:])
    other = PairData(**fields, source_key="fr", target_key="en", heldout_split="validation")
    other.prepare(tmp_path)
    assert sorted(decoded(other, tmp_path, "heldout")) == sorted(pair[::-1] for pair in PAIRS[30:34])
    with pytest.raises(UserError, match=r"data.target_key='de': no such feature .* Use one of en, fr"):
        PairData(**fields, target_key="de").prepare(tmp_path)


def test_damaged_examples_of_a_tfds_set_are_named(tmp_path):
    """Fault: text that is not UTF-8 is a traceback."""
    bad = [("bad", b"\xff") if index == 2 else pair for index, pair in enumerate(PAIRS[:12])]
    prepare_wmt14(tmp_path, "en-fr", {"train": bad, "test": PAIRS[12:15]})
    source = PairData(source="tfds:wmt14_translate/en-fr:1.0.0", data_dir=str(tmp_path)).open_source()
    (found,) = [pair for pair in source.records("train") if isinstance(pair, Malformed)]
    assert "not UTF-8 at byte 0" in str(found) and "split 'train', row" in str(found)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_random_access_equals_the_stream_on_any_number_of_processes(sample, processes):
    """Fault: an example depends on the reading process or on earlier reads."""
    data, cache = sample
    rows = data.examples("train", cache)
    whole = Batches(rows, seed=3, global_batch_size=8, rows=range(8)).from_step(0)
    expected = [next(whole) for _ in range(4)]
    for process in range(processes):
        mine = range(process * 8 // processes, (process + 1) * 8 // processes)
        batches = Batches(data.examples("train", cache), seed=3, global_batch_size=8, rows=mine)
        for step in (3, 0, 2):
            part = {name: array[list(mine)] for name, array in expected[step].items()}
            jax.tree.map(np.testing.assert_array_equal, batches[step], part)


def test_unusable_sources_are_one_line(tmp_path, wmt14):
    """Fault: a wrong name is found late, with a traceback, or after files were written."""
    few = write_tsv(tmp_path / "few.tsv", PAIRS[:5])
    (tmp_path / "gpt.json").write_text(
        train_tokenizer((text for pair in PAIRS for text in pair), 300).to_str().replace("<|endoftext|>", "<|other|>")
    )
    cases = [
        ({"source": few}, "have 5 different records"),
        ({"source": f"file:{tmp_path}"}, r"write file:.*\*\.tsv"),
        ({"source": "tfds:wmt14_translate/de-en:1.0.0", "data_dir": str(wmt14)}, "tfds build wmt14_translate/de-en"),
        ({"tokenizer": f"{tmp_path}/gpt.json"}, "as token None; pairs need it as token 0"),
    ]
    for fields, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            PairData(**SMALL | fields).prepare(tmp_path / "cache")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "nt"}, "sample:nt"),
        ({"source": "sample:ot"}, "sample:nt"),
        ({"heldout_split": "dev"}, "'dev': sample:nt holds out 'validation' or 'test'"),
        ({"source_length": 1}, "source_length=1: must be at least 2"),
        ({"target_column": 0}, "target_column=0"),
        ({"pairs_per_row": -1}, "pairs_per_row=-1"),
        ({"vocab_size": 256}, "at least 257"),
    ],
)
def test_fields_are_checked(fields, message):
    """Fault: an invalid value is accepted at construction and fails in the middle of a run."""
    with pytest.raises(ValueError, match=message):
        PairData(**fields)
