import itertools
import json
import lzma
import os
import subprocess
import sys

import imagenet
import numpy as np
import pytest

from shampax.framework.base.errors import UserError
from shampax.framework.data import samples
from shampax.framework.data.images import ImageData, pictures
from shampax.framework.data.pipeline import Batches, HeldoutBatches
from shampax.framework.dataset import SPLITS

SMALL = {"source": "tfds:imagenet2012:5.1.0", "image_size": 24, "classes": 1_000}


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    imagenet.prepare(directory, {"train": imagenet.photos(40), "validation": imagenet.photos(9, 40)})
    return str(directory)


@pytest.fixture(params=["sample", "tfds"])
def data(request, tfds_dir):
    return ImageData() if request.param == "sample" else ImageData(data_dir=tfds_dir, **SMALL)


def batches_of(data, tmp_path, rows=range(8), seed=3):
    source = data.examples("train", tmp_path)
    return Batches(source, seed=seed, global_batch_size=8, rows=rows, augment=data.augment)


def equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


def test_a_sample_is_decompressed_once(tmp_path, monkeypatch):
    """Fault: a start decompresses its sample again for each split and for the fingerprint: a third of a second."""
    read, decompress = [], lzma.decompress
    monkeypatch.setattr(lzma, "decompress", lambda content: read.append(content) or decompress(content))
    samples.read.cache_clear()
    samples.sha256.cache_clear()
    data = ImageData()
    data.prepare(tmp_path)
    for split in SPLITS:
        data.examples(split, tmp_path)
    data.fingerprint(tmp_path)
    assert len(read) == len(SPLITS)


def test_the_sample_matches_its_notice(tmp_path):
    """Faults: labels do not match pixels; rows are transposed; splits are swapped."""
    for split, count in (("train", 2_000), ("heldout", 500)):
        examples = ImageData().examples(split, tmp_path)
        read = [examples[index] for index in range(len(examples))]
        assert np.bincount([example["label"] for example in read]).tolist() == [count // 10] * 10
        images = np.stack([example["image"][..., 0] for example in read])
        assert 65 < images.mean() < 80  # mean of Fashion-MNIST: 72.9
        trousers = images[[example["label"] == 1 for example in read]].mean(axis=0)
        assert trousers[:, :6].mean() < 5 < trousers[:6].mean()  # trousers: two vertical legs


def test_examples_match_their_spec(data, tmp_path):
    """Faults: held-out and training examples differ in shape or type; they differ from the spec that programs are
    compiled for."""
    trained = batches_of(data, tmp_path)[0]
    judged = HeldoutBatches(data.examples("heldout", tmp_path), global_batch_size=8, rows=range(8))[0]
    for name, spec in data.spec().items():
        for batch in (trained, judged):
            assert (batch[name].shape, batch[name].dtype) == ((8, *spec.shape), spec.dtype)
    assert (trained["weight"] == 1).all()
    assert trained.keys() == judged.keys() == data.spec().keys()


def test_crops_and_flips_are_functions_of_seed_step_and_row(data, tmp_path):
    """Fault: random numbers depend on the process, the reading order or the epoch before."""
    whole = [batches_of(data, tmp_path)[number] for number in range(4)]
    for rows in ([5], [0, 6]):
        part = batches_of(data, tmp_path, rows)
        for number in (3, 0):
            equal(part[number], {name: array[rows] for name, array in whole[number].items()})
    other = batches_of(data, tmp_path, seed=4)[0]
    assert (other["image"] != whole[0]["image"]).any()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_read_the_stream(data, tmp_path, processes):
    """Fault: another number of processes, or a resumed run, trains on other images."""
    whole = batches_of(data, tmp_path)
    shares = np.array_split(np.arange(8), processes)
    streams = [itertools.islice(batches_of(data, tmp_path, rows).from_step(5), 3) for rows in shares]
    for number, parts in zip(range(5, 8), zip(*streams, strict=True), strict=True):
        equal({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, whole[number])


def test_augmentation_keeps_labels_and_weights(tmp_path):
    """Faults: labels or weights are lost; images are never mirrored; augmentation cannot be turned off."""
    example = ImageData().examples("train", tmp_path)[0]
    seen = [ImageData(shift=0).augment(example, np.random.default_rng(seed))["image"] for seed in range(20)]
    mirrored = [not np.array_equal(image, example["image"]) for image in seen]
    assert 3 < sum(mirrored) < 17
    np.testing.assert_array_equal(seen[mirrored.index(True)], example["image"][:, ::-1])
    plain = ImageData(shift=0, flip=False)
    for seed in range(4):
        equal(plain.augment(example, np.random.default_rng(seed)), example)
    moves = [ImageData(shift=2, flip=False).augment(example, np.random.default_rng(seed)) for seed in range(60)]
    assert len({move["image"].tobytes() for move in moves}) > 15  # of 25


def test_images_and_labels_of_a_tfds_set_belong_together(tfds_dir, tmp_path):
    """Faults: labels are of other images; files are decoded wrongly; held-out images are from the training split."""
    data = ImageData(data_dir=tfds_dir, **SMALL)
    train, heldout = (data.examples(split, tmp_path) for split in ("train", "heldout"))
    assert sorted(int(train[index]["label"]) for index in range(len(train))) == list(range(40))
    assert sorted(int(heldout[index]["label"]) for index in range(len(heldout))) == list(range(40, 49))
    for index in range(12):
        content, _ = imagenet.photos(1, int(train[index]["label"]))[0]
        np.testing.assert_array_equal(train[index]["image"], pictures.decode(content))
    (content, label), example = imagenet.photos(1, int(heldout[0]["label"]))[0], heldout[0]
    pixels = pictures.decode(content)
    box = pictures.central_box(*pixels.shape[:2], 0.875)
    np.testing.assert_array_equal(example["image"], pictures.resized(pixels, box, 24))
    assert example["label"] == label


READ = """
import json, pathlib, sys
from shampax.framework.data.images import ImageData
from shampax.framework.data.pipeline import Batches
data = ImageData(source="tfds:imagenet2012:5.1.0", data_dir=sys.argv[1], image_size=24, classes=1_000)
data.prepare(pathlib.Path("none"))
source = data.examples("train", pathlib.Path("none"))
batches = Batches(source, seed=1, global_batch_size=4, rows=range(4), augment=data.augment)
print(json.dumps({"shape": next(batches.from_step(3))["image"].shape, "tensorflow": "tensorflow" in sys.modules}))
"""


def test_a_tfds_set_is_read_without_tensorflow(tfds_dir):
    """Faults: TensorFlow decodes images; its import adds 2.5 s to the input path."""
    command = [sys.executable, "-c", READ, tfds_dir]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"shape": [4, 24, 24, 3], "tensorflow": False}


@pytest.fixture(scope="module")
def damaged_dir(tmp_path_factory):
    """Write 30 training images: one is truncated, one is a GIF, one has a label of another data set, one has a wrong
    checksum."""
    directory = tmp_path_factory.mktemp("damaged")
    pairs = imagenet.photos(30)
    pairs[4] = (pairs[4][0][:400], 4)
    pairs[11] = (imagenet.encoded(imagenet.photo(11), "GIF"), 11)
    pairs[20] = (pairs[20][0], 500)
    imagenet.prepare(directory, {"train": pairs, "validation": imagenet.photos(2, 40)}, classes=None)
    (shard,) = (directory / "imagenet2012" / "5.1.0").glob("*train*")
    content = bytearray(shard.read_bytes())
    content[3_000] ^= 0xFF
    shard.write_bytes(content)
    return str(directory)


def test_malformed_images_have_weight_0_and_are_named(damaged_dir, tmp_path, capfd):
    """Faults: a bad image ends the run, is trained on, moves the others, or is skipped without a message or with one in
    every epoch."""
    data = ImageData(data_dir=damaged_dir, **{**SMALL, "classes": 100, "max_malformed": 4})
    source = data.examples("train", tmp_path)
    first = [source[index] for index in range(30)]
    bad = [index for index, example in enumerate(first) if example["weight"] == 0]
    assert len(bad) == 4
    for index in bad:
        augmented = data.augment(source[index], np.random.default_rng(0))
        assert not augmented["image"].any()
        assert augmented["image"].shape == (24, 24, 3)
    said = capfd.readouterr().err
    for reason in ("OSError: ", "neither JPEG nor PNG", "label 500 is not in 0 .. data.classes - 1 = 99", "Corrupted"):
        assert said.count(reason) == 1
    assert said.count("tfds:imagenet2012:5.1.0 split 'train', row") == 4


def test_too_many_malformed_images_end_the_run(damaged_dir, tmp_path):
    """Faults: the limit counts an image twice or is never reached; an error in a reading thread is lost."""
    data = ImageData(data_dir=damaged_dir, **{**SMALL, "classes": 100, "max_malformed": 3})
    with pytest.raises(UserError, match=r"max_malformed=3: 4 records are malformed \(tfds:imagenet2012:5\.1\.0"):
        list(itertools.islice(batches_of(data, tmp_path).from_step(0), 12))
    strict = ImageData(data_dir=damaged_dir, **{**SMALL, "classes": 100})
    with pytest.raises(UserError, match=r"max_malformed=0: (1 record is|[2-4] records are) malformed"):
        list(itertools.islice(batches_of(strict, tmp_path).from_step(0), 12))


def test_fingerprints_differ_between_data(tfds_dir, damaged_dir, tmp_path):
    """Fault: a run continues with other data without an error."""
    made = [
        ImageData(),
        ImageData(data_dir=tfds_dir, **SMALL),
        ImageData(data_dir=damaged_dir, **SMALL),
        ImageData(data_dir=tfds_dir, heldout_split="validation[:4]", **SMALL),
    ]
    assert len({each.fingerprint(tmp_path) for each in made}) == len(made)
    assert ImageData(shift=1).fingerprint(tmp_path) == ImageData().fingerprint(tmp_path)


def test_unusable_sets_are_refused_before_training(tfds_dir, tmp_path):
    """Fault: a wrong name is found after compilation or with a traceback."""
    here = {**SMALL, "data_dir": tfds_dir}
    for fields, message in [
        ({**here, "source": "tfds:imagenet2012"}, "has no version"),
        ({**here, "image_key": "picture"}, "data.image_key='picture': no such feature .* Use one of"),
        ({**here, "heldout_split": "test"}, "data.heldout_split='test': no such split .* Use one of train, validation"),
        ({**here, "data_dir": str(tmp_path)}, "tfds build imagenet2012"),
        ({**here, "classes": 999}, "data.classes=999: tfds:imagenet2012:5.1.0 has 1000 classes. Set data.classes=1000"),
        ({"classes": 9}, "data.classes=9: sample:fashion_mnist has 10 classes"),
    ]:
        with pytest.raises(UserError, match=message):
            ImageData(**fields).prepare(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "file:x.png"}, "'file:x.png': write 'sample:fashion_mnist'"),
        ({"image_size": 32}, "32: the sample's images have 28"),
        ({"classes": 0}, "must be at least 1"),
        ({"shift": 28}, "at least 0 and at most 27"),
        ({"max_malformed": -1}, "at least 0"),
    ],
)
def test_fields_are_checked(fields, message):
    """Fault: an invalid value is accepted at construction and fails in the middle of a run."""
    with pytest.raises(ValueError, match=message):
        ImageData(**fields)
