"""Prepared tensorflow-datasets sets in array_record form: random access without TensorFlow."""

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ...base.errors import UserError
from ...dataset import Split
from .malformed import Malformed

_READ_AHEAD = 256  # examples fetched at once
_SHOWN = 80  # characters of another library's message


class TfdsSet:
    """Two splits of a set in `data_dir`/NAME[/CONFIG]/VERSION, local or gs://.

    Args:
      name: "c4/en:3.1.0".
      data_dir: "" uses $TFDS_DATA_DIR or tfds' default, ~/tensorflow_datasets.
      features: required features by the knob of `data` that names them.
      splits: the names of the two in the set, which may be tfds slices such as "train[:90%]".
      decoders: passed to tfds, `{"image": tfds.decode.SkipDecoding()}`.

    Attributes:
      features: names of the features.
      fingerprint: text that changes with the set, its splits and features.
      text_bytes: size of the whole set.

    Raises:
      UserError: the set is not prepared in this form, or lacks a feature or split; or the splits share examples.
    """

    def __init__(
        self, name: str, data_dir: str, features: Mapping[str, str], splits: Mapping[Split, str], decoders: Any = None
    ):
        import tensorflow_datasets as tfds  # takes 0.4 s, and only this source needs it

        dataset, _, version = name.partition(":")
        if not version:
            raise UserError(f"data.source='tfds:{name}': has no version. Write it in full, as in tfds:lm1b:1.1.0.")
        root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        directory = f"{os.path.expanduser(root).rstrip('/')}/{dataset}/{version}"
        prepare = f"prepare it with: tfds build {dataset} --data_dir={root} --file_format=array_record"
        try:
            builder: Any = tfds.builder_from_directory(directory)
        except (OSError, tfds.core.DatasetNotFoundError) as error:
            raise UserError(
                f"data.source='tfds:{name}': is not prepared in {directory}. Set data.data_dir, or {prepare}"
            ) from error
        for knob, feature in features.items():
            _require(f"data.{knob}", feature, builder.info.features, f"feature in tfds:{name}")
        file_format = builder.info.file_format
        suffix = file_format and file_format.file_suffix
        if suffix != "array_record":
            raise UserError(f"{directory}: is in {suffix} form, which has no random access; {prepare}")
        self._builder, self._name, self._splits, self._decoders = builder, name, splits, decoders
        taken = {}
        for split, slices in splits.items():
            knob = f"data.{split}_split"
            try:
                parts = builder.info.splits[slices].file_instructions
            except (KeyError, ValueError):
                _require(knob, slices, builder.info.splits, f"split in tfds:{name}")
                raise
            taken[split] = [(part.filename, part.skip, part.skip + part.take) for part in parts]
            if not taken[split]:
                raise UserError(f"{knob}={slices!r}: is empty in tfds:{name}. Choose another split.")
            try:
                _fetch(self.source(split), [0])
            except (OSError, RuntimeError, ValueError, IndexError) as error:
                raise UserError(f"split {slices!r} in {directory}: cannot be read ({error}); {prepare}") from None
        for (file, start, end), (other, other_start, other_end) in itertools.product(taken["train"], taken["heldout"]):
            if file == other and start < other_end and other_start < end:
                raise UserError(
                    f"data.train_split={splits['train']!r} and data.heldout_split={splits['heldout']!r}: share "
                    f"examples of {file} in tfds:{name}. Choose splits that do not overlap."
                )
        self.features, self.text_bytes = list(features.values()), int(builder.info.dataset_size or 0)
        self.fingerprint = hashlib.sha256(repr((directory, sorted(self.features), taken)).encode()).hexdigest()

    def source(self, split: Split) -> Any:
        """Return random access to the examples of a split: dicts of features, text as bytes."""
        return self._builder.as_data_source(split=self._splits[split], decoders=self._decoders)

    def classes(self, feature: str) -> int:
        """Return the number of labels of a feature, 0 if the set does not declare it."""
        return getattr(self._builder.info.features[feature], "num_classes", None) or 0

    def place(self, split: Split, index: int) -> str:
        """Return the name of an example for errors."""
        return f"tfds:{self._name} split {self._splits[split]!r}, row {index + 1}"

    def examples(self, split: Split, source: Any, indices: list[int]) -> list[dict[str, Any] | Malformed]:
        """Return examples by index from `source(split)`; Malformed if a checksum does not match."""
        return [
            Malformed(self.place(split, index), str(example)[:_SHOWN]) if isinstance(example, RuntimeError) else example
            for index, example in zip(indices, _fetch(source, indices), strict=True)
        ]

    def stream(self, split: Split, start: int, stop: int) -> Iterator[tuple[str, dict[str, Any] | Malformed]]:
        """Yield examples `start` to `stop` of a split with their places; Malformed if a checksum does not match.

        Raises:
          UserError: the files cannot be read.
        """
        source = self.source(split)
        for first in range(start, stop, _READ_AHEAD):
            indices = list(range(first, min(first + _READ_AHEAD, stop)))
            try:
                fetched = self.examples(split, source, indices)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"split {self._splits[split]!r} of tfds:{self._name}: cannot be read any further ({error}). "
                    "Check its files."
                ) from None
            yield from ((self.place(split, index), example) for index, example in zip(indices, fetched, strict=True))


def _require(knob: str, value: str, known: Any, what: str) -> None:
    if value not in known:
        raise UserError(f"{knob}={value!r}: no such {what}. Use one of {', '.join(sorted(known))}.")


def _fetch(examples: Any, indices: list[int]) -> list[Any]:
    """Return examples by index; a RuntimeError takes the place of each whose checksum does not match."""
    try:
        return examples.__getitems__(indices)
    except RuntimeError as error:
        if not str(error).startswith("Corrupted"):
            raise
        if len(indices) == 1:
            return [error]
        return [example for index in indices for example in _fetch(examples, [index])]
