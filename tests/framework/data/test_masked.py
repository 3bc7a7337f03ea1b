import dataclasses
import itertools
import json
import string
import subprocess
import sys

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tokenizers import Tokenizer, models

from shampax.framework.base.errors import UserError
from shampax.framework.config import components
from shampax.framework.config.check import load
from shampax.framework.data.masked import MaskedTextData
from shampax.framework.data.masked.masked import masked_row
from shampax.framework.data.masked.next_sentence import groups, pairs, split_sentences
from shampax.framework.data.pipeline import Batches, HeldoutBatches
from shampax.framework.data.text import wordpiece
from shampax.framework.data.text.wordpiece import Vocabulary
from shampax.framework.train import train

WORDS = ("anchor", "basin", "candle", "dragon", "ember", "falcon", "garden", "harbour", "island", "jungle", "kettle")


def document(number, sentences=6):
    """Return sentences with the number of their document and their position in it."""
    random = np.random.default_rng(number)
    return "\n".join(
        f"Place {chr(97 + number)} {chr(97 + place)} has the {' '.join(random.choice(WORDS, 4))}."
        for place in range(sentences)
    )


TEXTS = [document(number) for number in range(20)]
FIELDS = {"sequence_length": 24, "predictions": 4, "vocab_size": 160}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Prepare twenty documents of one file."""
    folder = tmp_path_factory.mktemp("masked")
    (folder / "a.txt").write_text("\f".join(TEXTS))
    data = MaskedTextData(source=f"file:{folder}/*.txt", **FIELDS)
    data.prepare(folder / "cache")
    return data, folder / "cache"


def rows_of(data, cache, split):
    source = data.examples(split, cache)
    return [source[index] for index in range(len(source))]


def test_sentence_ends():
    """Faults: sentences are cut at abbreviations before lower-case letters, or not at closing quotes and line
    breaks."""
    text = 'A title\n\nOne end. Two ends!  "Three?" (Four.) Five e.g. here, 3.5 of it.\n  Six\n'
    expected = ["A title", "One end.", "Two ends!", '"Three?"', "(Four.)", "Five e.g. here, 3.5 of it.", "Six"]
    assert split_sentences(text) == expected
    assert split_sentences(" \n\t") == []


def test_labels_of_next_sentences():
    """Faults: a label is wrong; the random text is of the same document; sentences are lost."""
    # Every token has its document and position.
    stories, place = [], 0
    for number in range(30):
        lengths = np.random.default_rng(number).integers(1, 9, size=12)
        stories.append([])
        for length in lengths:
            stories[-1].append(np.arange(place, place + length, dtype=np.int32))
            place += length
    owner = np.repeat(np.arange(30), [sum(map(len, story)) for story in stories])
    seen, labels = set(), []
    for pair in pairs(stories, capacity=20, short_rate=0.1, rng=np.random.default_rng(0)):
        assert len(pair.first) and len(pair.second)
        assert len(pair.first) + len(pair.second) <= 20
        assert (np.diff(pair.first) == 1).all() and (np.diff(pair.second) == 1).all()
        same = owner[pair.first[0]] == owner[pair.second[0]]
        assert pair.is_next == same
        # Both texts can be shortened by tokens at either end.
        assert not same or 0 < pair.second[0] - pair.first[-1] < 15
        seen.update(pair.first.tolist(), pair.second.tolist() if pair.is_next else ())
        labels.append(pair.is_next)
    assert 0.35 < np.mean(labels) < 0.6
    assert len(seen) > 0.9 * place


def test_every_group_has_two_documents():
    """Faults: the last group has only one document, and so no other to take a random text from; documents are empty."""
    one = [np.array([1])]
    for count in range(1, 12):
        found = [len(group) for group in groups([one, []] * count, 3)]
        assert sum(found) == count
        assert count == 1 or min(found) >= 2


def decoder(data, cache):
    tokenizer = data.load_tokenizer(cache)
    return lambda tokens: tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def test_rows_have_the_published_layout(texts):
    """Faults: special tokens are missing or misplaced; segments do not end with [SEP]; padding has weight."""
    data, cache = texts
    decode = decoder(data, cache)
    for row in rows_of(data, cache, "train"):
        text = decode(row["tokens"])
        first, second = (decode(row["tokens"][row["segments"] == number]) for number in (1, 2))
        assert first.startswith("[CLS]") and first.count("[SEP]") == 1 and first.endswith("[SEP]")
        assert second.endswith("[SEP]") and second.count("[SEP]") == 1 and "[CLS]" not in second
        assert text.count("[PAD]") == (row["segments"] == 0).sum()
        assert np.array_equal(np.sort(row["segments"][row["segments"] > 0]), row["segments"][row["segments"] > 0])


def test_held_out_documents_are_never_trained_on(texts):
    """Faults: a random second text is of the other split; the vocabulary has held-out words."""
    data, cache = texts
    decode = decoder(data, cache)
    owners = {
        split: {word for row in rows_of(data, cache, split) for word in marks(restored(row, decode))}
        for split in ("train", "heldout")
    }
    assert owners["heldout"] and not owners["train"] & owners["heldout"]
    assert owners["train"] | owners["heldout"] == set(string.ascii_lowercase[:20])
    expected = wordpiece.train_wordpiece(data.open_source().records("train"), data.vocab_size, lower_case=True)
    (path,) = cache.glob("tokenizer-*.json")
    assert wordpiece.load_wordpiece(path, data.vocab_size).get_vocab() == expected.get_vocab()


def restored(row, decode):
    """Return the text of a row without its masks."""
    tokens = row["tokens"].copy()
    if "masked_positions" in row:
        chosen = row["masked_positions"] > 0
        tokens[row["masked_positions"][chosen]] = row["masked_tokens"][chosen]
    return decode(tokens)


def marks(text):
    """Return the documents of the sentences of a text."""
    words = text.replace("[SEP]", " ").split()
    return {b for a, b in itertools.pairwise(words) if a == "place" and len(b) == 1}


def test_masks_have_the_published_statistics():
    """Faults: shares are not 80/10/10; the rate is wrong; special tokens are masked or inserted; a token is masked
    twice."""
    vocabulary = Vocabulary(50, pad=0, unknown=7, start=1, separator=49, mask=20)
    length, predictions = 100, 20
    segments = np.repeat([1, 2, 0], [50, 40, 10]).astype(np.int32)
    rng = np.random.default_rng(0)
    counts, kinds = np.zeros(length), np.zeros(3)
    put_in = np.zeros(50, int)
    ordinary = np.setdiff1d(np.arange(50), vocabulary[1:])
    for _ in range(2000):
        tokens = rng.choice(ordinary, length).astype(np.int32)
        tokens[[0, 49, 89, 30]] = 1, 49, 49, 7
        tokens[90:] = 0
        row = masked_row(tokens, segments, vocabulary, rng, rate=0.15, predictions=predictions)
        places = row["masked_positions"][:14]  # 15 % of 90 slots are 13.5, rounded to even
        assert (row["masked_positions"][14:] == 0).all() and (row["masked_tokens"][14:] == 0).all()
        assert (np.diff(places) > 0).all()
        assert np.array_equal(row["masked_tokens"][:14], tokens[places])
        others = np.setdiff1d(np.arange(length), places)
        assert np.array_equal(row["tokens"][others], tokens[others])
        counts[places] += 1
        new, old = row["tokens"][places], tokens[places]
        kinds += [(new == 20).sum(), ((new != 20) & (new != old)).sum(), (new == old).sum()]
        np.add.at(put_in, new[(new != 20) & (new != old)], 1)
    assert counts[[0, 49, 89, 30]].sum() == counts[90:].sum() == 0
    drawn = counts[counts > 0]
    assert len(drawn) == 86
    assert np.abs(drawn / drawn.mean() - 1).max() < 0.25
    # A random token equals the original one in 1 of 45 cases.
    np.testing.assert_allclose(kinds / kinds.sum(), [0.8, 0.1 * 44 / 45, 0.1 + 0.1 / 45], atol=0.008)
    assert (put_in[ordinary] > 0).all() and put_in[list(vocabulary[1:])].sum() == 0


def test_a_short_row_has_at_least_one_prediction():
    """Faults: a row has no prediction, and its loss is 0 / 0; a row has more predictions than the fixed shape
    allows."""
    vocabulary = Vocabulary(50, 0, 1, 2, 3, 4)
    tokens = np.array([2, 9, 3, 8, 3, 0, 0, 0], np.int32)
    segments = np.array([1, 1, 1, 2, 2, 0, 0, 0], np.int32)
    for predictions, rate, expected in ((4, 0.01, 1), (4, 0.99, 2), (1, 0.99, 1)):
        row = masked_row(tokens, segments, vocabulary, np.random.default_rng(0), rate=rate, predictions=predictions)
        assert (row["masked_positions"] > 0).sum() == expected
        assert row["masked_positions"].shape == row["masked_tokens"].shape == (predictions,)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_masks_are_a_function_of_seed_step_and_row(texts, processes):
    """Fault: masks depend on the reading process, on the reading order, or only on the row."""
    data, cache = texts

    def batches(rows, seed=3):
        return Batches(data.examples("train", cache), seed=seed, global_batch_size=8, rows=rows, augment=data.augment)

    whole = batches(range(8)).from_step(2)
    stream = [next(whole) for _ in range(4)]
    share = 8 // processes
    parts = [batches(range(process * share, (process + 1) * share)) for process in range(processes)]
    for number in (3, 0, 2):  # steps 5, 2 and 4
        read = [part[number + 2] for part in parts]
        for name, array in stream[number].items():
            np.testing.assert_array_equal(np.concatenate([each[name] for each in read]), array)
    assert not np.array_equal(batches(range(8), seed=4)[2]["tokens"], stream[0]["tokens"])
    spec = data.spec()
    assert {name: (array.shape[1:], array.dtype) for name, array in stream[0].items()} == {
        name: (struct.shape, struct.dtype) for name, struct in spec.items()
    }


def test_masks_change_every_epoch_except_for_held_out_rows(texts):
    """Faults: masks are drawn once; held-out masks differ between evaluations."""
    data, cache = texts
    count = len(data.examples("train", cache))
    one = Batches(
        data.examples("train", cache), seed=0, global_batch_size=count, rows=range(count), augment=data.augment
    )
    masks = [sorted(map(tuple, one[epoch]["masked_positions"].tolist())) for epoch in range(2)]
    assert masks[0] != masks[1]
    passes = [
        list(HeldoutBatches(data.examples("heldout", cache), global_batch_size=4, rows=rows))
        for rows in (range(4), range(4), [1, 3])
    ]
    for first, again, part in zip(*passes, strict=True):
        for name in data.spec():
            np.testing.assert_array_equal(first[name], again[name])
            np.testing.assert_array_equal(first[name][[1, 3]], part[name])
            assert first[name].dtype == data.spec()[name].dtype
    rows = rows_of(data, cache, "heldout")
    assert len({tuple(row["masked_positions"].tolist()) for row in rows}) > len(rows) / 2


def test_cache_is_used_and_stale_caches_are_not(texts, tmp_path, capfd):
    """Faults: every start pairs again; old rows are used for new settings; the fingerprint does not depend on the
    masks."""
    data, cache = texts
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    data.prepare(cache)
    assert before == {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    more = dataclasses.replace(data, mask_rate=0.3)
    assert more.fingerprint(cache) != data.fingerprint(cache)
    with pytest.raises(UserError, match="call prepare"):
        dataclasses.replace(data, sequence_length=32).examples("train", cache)
    data.prepare(tmp_path / "elsewhere")
    assert data.fingerprint(tmp_path / "elsewhere") == data.fingerprint(cache)
    longer = dataclasses.replace(data, sequence_length=32)
    longer.prepare(cache)
    assert len(list(cache.glob("tokenizer-*"))) == 1  # one for both lengths


def test_malformed_documents_are_skipped_up_to_a_limit(tmp_path, capfd):
    """Faults: one bad document ends the run although it may be skipped; it is skipped without a message."""
    parts = [text.encode() for text in TEXTS]
    parts[6] = b"bad \xff"
    (tmp_path / "a.txt").write_bytes(b"\f".join(parts))
    data = MaskedTextData(source=f"file:{tmp_path}/*.txt", **FIELDS)
    with pytest.raises(UserError, match=r"max_malformed=0: 1 record is malformed .*document 7: not UTF-8"):
        data.prepare(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    data = dataclasses.replace(data, max_malformed=1)
    data.prepare(tmp_path / "cache")
    assert "document 7: not UTF-8 at byte 4), skipped" in capfd.readouterr().err
    (stamp,) = (tmp_path / "cache").glob("rows-*/manifest.json")
    totals = json.loads(stamp.read_text())["splits"]
    assert [totals[split]["malformed"]["count"] for split in ("train", "heldout")] == [
        1,
        0,
    ]


def test_one_document_is_too_few(tmp_path):
    """Faults: random texts are of the document itself; the search for another document never ends."""
    (tmp_path / "a.txt").write_text("\f".join(TEXTS[:10]))
    with pytest.raises(UserError, match="has 1 document to use in its heldout split and needs at least 2"):
        MaskedTextData(source=f"file:{tmp_path}/*.txt", **FIELDS).prepare(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("rows-*"))


TRAIN_VOCABULARY = """
import hashlib, sys
from shampax.framework.data.text.wordpiece import train_wordpiece
texts = open(sys.argv[1]).read().split("\\f")
print(hashlib.sha256(train_wordpiece(texts, 160, lower_case=True).to_str().encode()).hexdigest())
"""


def test_the_vocabulary_is_the_same_in_every_process(tmp_path):
    """Fault: the trainer numbers its alphabet in the order of a hash that differs between processes."""
    (tmp_path / "a.txt").write_text("\f".join(TEXTS))
    command = [sys.executable, "-c", TRAIN_VOCABULARY, str(tmp_path / "a.txt")]
    made = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)}
    assert len(made) == 1


def test_wordpiece_splits_words_as_published():
    """Faults: case or accents are kept; punctuation is inside words; text can have special tokens; rare letters are in
    the alphabet."""
    rare = "".join(map(chr, range(0x3B1, 0x3B1 + 80)))
    tokenizer = wordpiece.train_wordpiece(["the house, the houses [mask]"] * 9 + [rare], 150, lower_case=True)
    assert wordpiece.vocabulary_of(tokenizer)[1:] == (0, 1, 2, 3, 4)

    def pieces(text):
        return tokenizer.encode(text, add_special_tokens=False).tokens

    assert pieces("The, Hous\u00e9") == ["the", ",", "house"]
    assert "".join(pieces("[MASK]")).replace("##", "") == "[mask]"
    assert pieces("houses")[0] != pieces("ses")[0]
    assert pieces("the \u0431 the") == ["the", "[UNK]", "the"]
    assert "##," not in tokenizer.get_vocab()


def test_a_given_tokenizer_is_used_and_checked(texts, tmp_path):
    """Faults: special tokens with other numbers count as words; an unsuitable file fails in the middle of a run."""
    data, cache = texts
    (path,) = cache.glob("tokenizer-*.json")
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    size = len(vocabulary)
    moved = {token: size - 1 - number for token, number in vocabulary.items()}  # special tokens come last
    (tmp_path / "moved.json").write_text(json.dumps(content | {"model": content["model"] | {"vocab": moved}}))
    given = dataclasses.replace(data, tokenizer=str(tmp_path / "moved.json"))
    given.prepare(tmp_path / "cache")
    ours, theirs = rows_of(data, cache, "train"), rows_of(given, tmp_path / "cache", "train")
    assert all(np.array_equal(size - 1 - a["tokens"], b["tokens"]) for a, b in zip(ours, theirs, strict=True))
    masked = given.augment(theirs[0], np.random.default_rng(0))
    assert size - 1 - 4 in masked["tokens"]
    for text, message in (
        ("{", "is not a tokenizers JSON file"),
        (Tokenizer(models.BPE()).to_str(), "type 'BPE'; masked text needs WordPiece"),
        (path.read_text().replace("[MASK]", "[mask]"), r"has no \[MASK\]"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match=message):
            dataclasses.replace(data, tokenizer=str(tmp_path / "bad.json")).prepare(tmp_path / "other")
    (tmp_path / "large.json").write_text(path.read_text().replace('"[MASK]": 4', '"[MASK]": 400'))
    with pytest.raises(UserError, match=r"vocab_size=160: .* has 401 tokens"):
        dataclasses.replace(data, tokenizer=str(tmp_path / "large.json")).prepare(tmp_path / "other")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "wiki"}, "sample:enwiki"),
        ({"sequence_length": 7}, "at least 8"),
        ({"vocab_size": 149}, "at least 150"),
        ({"mask_rate": 0.0}, "at least 1e-09 and at most 0.999"),
        ({"predictions": 0}, "predictions=0"),
        ({"predictions": 128}, "less than data.sequence_length=128"),
        ({"short_rate": 1.5}, "short_rate=1.5"),
        ({"max_malformed": -1}, "at least 0"),
    ],
)
def test_fields_are_checked(fields, message):
    """Fault: an invalid value is accepted at construction and fails in the middle of a run."""
    with pytest.raises(ValueError, match=message):
        MaskedTextData(**fields)


def prepare_wikipedia(directory):
    """Write documents as the tfds data set wikipedia/20230601.en:1.0.0, which has a title, a text and one split."""
    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="20230601.en"),)

            def _info(self):
                features = tfds.features.FeaturesDict({"title": tfds.features.Text(), "text": tfds.features.Text()})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for number in range(200):
                    yield number, {"title": f"Article {number}", "text": TEXTS[number % 20]}

        Builder.name = "wikipedia"
        tfds.disable_progress_bar()
        Builder(data_dir=directory, file_format="array_record", config="20230601.en").download_and_prepare()


@pytest.fixture
def wikipedia(tmp_path):
    """Return a config for a small BERT on Wikipedia."""
    prepare_wikipedia(tmp_path / "tfds")
    changes = (
        "data.source=tfds:wikipedia/20230601.en:1.0.0",
        f"data.data_dir={tmp_path / 'tfds'}",
        "task.vocab_size=160",
        "task.layers=1",
        "task.embed_dim=8",
        "task.heads=2",
        "task.mlp_dim=8",
        "data.sequence_length=16",
        "data.predictions=3",
        "batch_size=4",
        "duration=3 steps",
        "schedule.warmup=1 steps",
        "checkpoint.every=0 steps",
        "checkpoint.keep_best=0",
    )
    return load("shampax/configs/bert.py:sample_adamw", changes)


def test_wikipedia_opens_under_its_own_name(wikipedia, tmp_path):
    """Faults: the set's real name, features or only split do not open; its rows do not fit the model."""
    task, data = (components.build(section) for section in (wikipedia.task, wikipedia.data))
    data.prepare(tmp_path)
    rows, heldout = (data.examples(split, tmp_path) for split in ("train", "heldout"))
    assert len(rows) > 20 * len(heldout) > 0
    batch = dict(Batches(rows, seed=0, augment=data.augment, global_batch_size=4, rows=range(4))[0])
    spec = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), batch)

    def first_loss(key):
        return task.loss(task.init(key, spec), batch, key=key, train=True)[0]

    assert jax.eval_shape(first_loss, jax.random.key(0)).shape == ()


@pytest.mark.slow
def test_wikipedia_trains_under_its_own_name(wikipedia, tmp_path):
    """Fault: the rows cannot be trained on."""
    result = train(wikipedia, tmp_path / "run", devices=jax.devices()[:1])
    assert result["steps"] == 3
    assert result["heldout_loss"] > 0
    (stamp,) = (tmp_path / "run" / "data").glob("rows-*/manifest.json")
    stamp = json.loads(stamp.read_text())["splits"]
    assert (stamp["train"]["documents"], stamp["heldout"]["documents"]) == (198, 2)
