"""Write made-up images in the form of ImageNet in tensorflow-datasets: name, version, splits and features."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def encoded(pixels, image_format="JPEG", **options):
    """Return the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **options)
    return file.getvalue()


def photo(number, height=40, width=56):
    """Return a smooth colourful picture [height, width, 3], different for each number."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def photos(count, first=0):
    """Return (file, label) pairs; sizes differ, and a few files are PNG or grey, as in ImageNet."""
    pairs = []
    for number in range(first, first + count):
        pixels = photo(number, 36 + number % 5, 60 - number % 7)
        kind = "PNG" if number % 10 == 3 else "JPEG"
        pairs.append((encoded(pixels[..., 0] if number % 10 == 7 else pixels, kind), number % 1_000))
    return pairs


def prepare(directory, splits, file_format="array_record", classes=1_000):
    """Write `splits` (name -> pairs of bytes and label) as imagenet2012:5.1.0 in `directory`, offline.

    With `classes` None the set does not say how many labels it has.
    """
    label = tfds.features.ClassLabel(num_classes=classes) if classes else tfds.features.Scalar(np.int64)
    with tfds.core.registered.skip_registration():

        class ImageNet(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("5.1.0")

            def _info(self):
                features = {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": label,
                    "file_name": tfds.features.Text(),
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(pairs) for split, pairs in splits.items()}

            def _generate_examples(self, pairs):
                for index, (content, label) in enumerate(pairs):
                    yield index, {"image": content, "label": label, "file_name": f"{index}.JPEG"}

        ImageNet.name = "imagenet2012"
        tfds.disable_progress_bar()
        ImageNet(data_dir=directory, file_format=file_format).download_and_prepare()
