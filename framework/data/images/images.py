"""Labelled images: JPEG and PNG files of a prepared tfds set, decoded when they are read, or the vendored sample."""

import dataclasses
import hashlib
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import numpy as np

from ...base import bounds
from ...base.bounds import Within
from ...base.errors import UserError
from ...dataset import Example, Source, Split
from .. import samples
from ..reading.malformed import Malformed, Rejects
from ..reading.tfds import TfdsSet
from . import pictures

_SAMPLE = "sample:fashion_mnist"
_SAMPLE_FILES: dict[Split, str] = {
    "train": "fashion-mnist-train-2000.u8.xz",
    "heldout": "fashion-mnist-test-500.u8.xz",
}
_SAMPLE_SIDE = 28
_HELDOUT_SHARE = 0.875  # side of the evaluated central crop / shorter side: 224 of 256


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Labelled images of one size, read when they are needed; nothing is cached.

    Examples are uint8 "image" [image_size, image_size, channels], int32 "label" [] and float32 "weight" []: 1, or 0 for
    an image that cannot be decoded. Each process that reads such an image names it on stderr once, and more than
    `max_malformed` of a split stop the run. The image keeps its place, so that batches stay a function of their index.
    """

    tokens_per_example: ClassVar[int] = 1

    source: str = _SAMPLE  # or "tfds:imagenet2012:5.1.0"
    image_size: Annotated[int, Within(1, 8192)] = 28  # side of the model's input in pixels; the sample's images have 28
    classes: Annotated[int, Within(1, 2**24)] = 10  # number of labels; labels count from 0
    data_dir: str = ""  # folder of tfds sets, local or gs://; "" uses $TFDS_DATA_DIR or ~/tensorflow_datasets
    image_key: str = "image"  # feature of a tfds set that holds the image's file
    label_key: str = "label"  # feature of a tfds set that holds the label
    train_split: str = "train"  # tfds split to train on
    heldout_split: str = "validation"  # tfds split to evaluate on
    shift: Annotated[int, Within(0, _SAMPLE_SIDE - 1)] = 2  # most pixels by which the sample's images move each way
    flip: bool = True  # mirror half of the training images
    rand_augment: Annotated[int, Within(0, 14)] = (
        0  # random operations on each training image (RandAugment); 2 is usual
    )
    rand_magnitude: Annotated[float, Within(0, 10)] = 10  # strength of these operations, up to 10
    max_malformed: Annotated[int, Within(0)] = 0  # malformed images of a split that are skipped

    def __post_init__(self):
        bounds.check("data", self)
        if self.source != _SAMPLE and not self.source.startswith("tfds:"):
            raise ValueError(f"data.source={self.source!r}: write {_SAMPLE!r} or 'tfds:imagenet2012:5.1.0'")
        if self.source == _SAMPLE and self.image_size != _SAMPLE_SIDE:
            raise ValueError(f"data.image_size={self.image_size}: the sample's images have {_SAMPLE_SIDE}")

    def prepare(self, cache: Path) -> None:
        """Check that the set exists, with these features and splits; nothing is written.

        Raises:
          UserError: it does not.
        """
        self.examples("train", cache)

    def examples(self, split: Split, cache: Path) -> Source:
        """Return the images of a split: whole and of any size in "train", cropped in "heldout".

        Raises:
          UserError: the set cannot be used; or, when an example is read, more than `max_malformed` are malformed.
        """
        return _SampleImages(split, self.classes) if self.source == _SAMPLE else _TfdsImages(self._set(), split, self)

    def augment(self, example: Example, rng: np.random.Generator) -> Example:
        """Return a random crop of a training image, or a shifted image of the sample; see `flip` and `rand_augment`."""
        image = example["image"]
        if self.source == _SAMPLE:
            down, right = rng.integers(-self.shift, self.shift, size=2, endpoint=True).tolist()
            image = pictures.shifted(image, down, right)
        else:
            height, width, _ = image.shape
            image = pictures.resized(image, pictures.random_box(height, width, rng), self.image_size)
        if self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        if self.rand_augment:
            image = pictures.rand_augmented(image, self.rand_augment, self.rand_magnitude, rng)
        return example | {"image": np.ascontiguousarray(image)}

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shapes and types of an augmented example."""
        channels = 1 if self.source == _SAMPLE else 3
        return {
            "image": jax.ShapeDtypeStruct((self.image_size, self.image_size, channels), np.uint8),
            "label": jax.ShapeDtypeStruct((), np.int32),
            "weight": jax.ShapeDtypeStruct((), np.float32),
        }

    def fingerprint(self, cache: Path) -> str:
        """Return a hash of the sample's bytes, or of a tfds set's path, splits, shards and features.

        Raises:
          UserError: the set does not exist any more.
        """
        if self.source != _SAMPLE:
            return self._set().fingerprint
        return hashlib.sha256("".join(map(samples.sha256, _SAMPLE_FILES.values())).encode()).hexdigest()

    def _set(self) -> TfdsSet:
        import tensorflow_datasets as tfds  # takes 0.4 s, and only this source needs it

        images = TfdsSet(
            self.source.removeprefix("tfds:"),
            self.data_dir,
            {"image_key": self.image_key, "label_key": self.label_key},
            {"train": self.train_split, "heldout": self.heldout_split},
            decoders={self.image_key: tfds.decode.SkipDecoding()},
        )
        _refuse_labels_above(self.classes, images.classes(self.label_key), self.source)
        return images


class _SampleImages:
    """The vendored images and labels of a split: N label bytes, then N x 28 x 28 pixels."""

    def __init__(self, split: Split, classes: int):
        content = np.frombuffer(samples.read(_SAMPLE_FILES[split]), np.uint8)
        count = content.size // (1 + _SAMPLE_SIDE**2)
        self._labels = content[:count].astype(np.int32)
        _refuse_labels_above(classes, int(self._labels.max()) + 1, _SAMPLE)
        self._images = content[count:].reshape(count, _SAMPLE_SIDE, _SAMPLE_SIDE, 1)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return _example(self._images[index], self._labels[index], 1)


class _TfdsImages:
    """Images of a tfds set, uint8: whole in "train", central crops in "heldout"; malformed ones are black, weight 0."""

    in_workers = True

    def __init__(self, images: TfdsSet, split: Split, data: ImageData):
        self._images, self._data = images, data
        self._split: Split = split
        self._source = images.source(split)
        self._rejects, self._skipped, self._lock = Rejects(data.max_malformed), set[int](), threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return self._data.examples, (self._split, Path())

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        return next(self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> Iterator[Example]:
        """Yield images, decoded one by one; their files are read by one call."""
        records = self._images.examples(self._split, self._source, list(indices))
        return (self._example(index, record) for index, record in zip(indices, records, strict=True))

    def _example(self, index: int, record: dict[str, Any] | Malformed) -> Example:
        read = self._decoded(index, record)
        if isinstance(read, Malformed):
            self._skip(index, read)
            example = _example(np.zeros((1, 1, 3), np.uint8), 0, 0)
        else:
            example = _example(*read, 1)
        if self._split == "train":
            return example
        height, width, _ = example["image"].shape
        box = pictures.central_box(height, width, _HELDOUT_SHARE)
        return example | {"image": pictures.resized(example["image"], box, self._data.image_size)}

    def _decoded(self, index: int, record: dict[str, Any] | Malformed) -> tuple[np.ndarray, int] | Malformed:
        if isinstance(record, Malformed):
            return record
        place, label = self._images.place(self._split, index), int(record[self._data.label_key])
        if not 0 <= label < self._data.classes:
            return Malformed(place, f"label {label} is not in 0 .. data.classes - 1 = {self._data.classes - 1}")
        try:
            return pictures.decode(record[self._data.image_key]), label
        except pictures.NotAnImage as error:
            return Malformed(place, str(error))

    def _skip(self, index: int, malformed: Malformed) -> None:
        """Count an image once, although threads meet it in every epoch, and name it; too many raise every time."""
        with self._lock:
            if index not in self._skipped:
                self._skipped.add(index)
                self._rejects.add(1, [str(malformed)])
                print(f"skipped, {self._rejects.count} of at most {self._rejects.limit}: {malformed}", file=sys.stderr)
            self._rejects.refuse_excess()


def _refuse_labels_above(classes: int, found: int, source: str) -> None:
    if found > classes:
        raise UserError(f"data.classes={classes}: {source} has {found} classes. Set data.classes={found}.")


def _example(image: np.ndarray, label: int, weight: float) -> Example:
    return {"image": image, "label": np.asarray(label, np.int32), "weight": np.asarray(weight, np.float32)}
