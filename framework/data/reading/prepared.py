"""A prepared tensorflow-datasets set in array_record form: random access without TensorFlow."""

import functools
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ...base.errors import UserError
from ...dataset import Split
from .records import Malformed

_READ_AHEAD = 256  # examples fetched at once
_SHOWN = 80  # characters of another library's message


class PreparedSet:
    """Two splits of a set that lies in `data_dir`/NAME[/CONFIG]/VERSION (local or gs://).

    Args:
      name: "c4/en:3.1.0".
      data_dir: "" is $TFDS_DATA_DIR or tfds' own default, ~/tensorflow_datasets.
      features: knob of `data` -> feature that it names and that the set must have.
      train, heldout: split names, which may be tfds slices such as "train[:90%]".
      decoders: passed to tfds, `{"image": tfds.decode.SkipDecoding()}`.

    Attributes:
      fingerprint: text that differs where set, splits or features do.

    Raises:
      UserError: the set is not prepared in this form, or lacks a feature or split; or the splits share examples.
    """

    def __init__(
        self,
        name: str,
        data_dir: str,
        features: Mapping[str, str],
        *,
        train: str,
        heldout: str,
        decoders: Any = None,
    ):
        import tensorflow_datasets as tfds  # 0.4 s, and only this source needs it

        dataset, _, version = name.partition(":")
        if not version:
            raise UserError(f"data.source 'tfds:{name}' has no version; write it in full, as in tfds:lm1b:1.1.0")
        root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        directory = f"{os.path.expanduser(root).rstrip('/')}/{dataset}/{version}"
        prepare = f"prepare it with: tfds build {dataset} --data_dir={root} --file_format=array_record"
        try:
            builder: Any = tfds.builder_from_directory(directory)
        except (OSError, tfds.core.DatasetNotFoundError) as error:
            raise UserError(
                f"data set tfds:{name} is not prepared in {directory}; set data.data_dir, or {prepare}"
            ) from error
        for knob, feature in features.items():
            if feature not in builder.info.features:
                known = ", ".join(sorted(builder.info.features))
                raise UserError(f"tfds:{name} has no feature {feature!r}; set data.{knob} to one of {known}")
        file_format = builder.info.file_format
        if file_format is None or file_format.file_suffix != "array_record":
            raise UserError(
                f"{directory} is in {file_format and file_format.file_suffix} form, which has no random access; "
                f"{prepare}"
            )
        self._splits: dict[Split, str] = {"train": train, "heldout": heldout}
        self._builder, self._name, self._decoders = builder, name, decoders
        taken = {}
        for knob, split in self._splits.items():
            try:
                parts = builder.info.splits[split].file_instructions
                ranges = [(part.filename, part.skip, part.skip + part.take) for part in parts]
            except (KeyError, ValueError) as error:
                known = ", ".join(sorted(builder.info.splits))
                raise UserError(
                    f"tfds:{name} has no split {split!r}; set data.{knob}_split to one of {known}"
                ) from error
            if not ranges:
                raise UserError(f"split {split!r} of tfds:{name} is empty; choose another data.{knob}_split")
            taken[knob] = ranges
            try:
                _fetch(self.source(knob), [0])
            except (OSError, RuntimeError, ValueError, IndexError) as error:
                raise UserError(f"split {split!r} in {directory} cannot be read ({error}); {prepare}") from None
        for (file, start, end), (other, other_start, other_end) in itertools.product(taken["train"], taken["heldout"]):
            if file == other and start < other_end and other_start < end:
                raise UserError(
                    f"data.train_split {train!r} and data.heldout_split {heldout!r} of tfds:{name} share "
                    f"examples of {file}; choose splits that do not overlap"
                )
        shown = sorted(features.values())
        self.fingerprint = hashlib.sha256(repr((directory, shown, taken)).encode()).hexdigest()

    def source(self, split: Split) -> Any:
        """Random access to the examples of a split, as tfds gives them: dicts of features, text as bytes; picklable."""
        return self._builder.as_data_source(split=self._splits[split], decoders=self._decoders)

    def records(self, split: Split) -> "Records":
        """The same, where a record that is damaged gives Malformed in place of an error."""
        return Records(self, split)

    def place(self, split: Split, index: int) -> str:
        """What an error calls an example."""
        return f"tfds:{self._name} split {self._splits[split]!r}, row {index + 1}"

    def count(self, split: Split) -> int:
        """How many examples a split has."""
        return len(self.source(split))

    def stream(
        self, split: Split, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[str, dict[str, Any] | Malformed]]:
        """Examples `start` to `stop` of a split with their places; malformed is one whose checksum does not hold.

        Raises:
          UserError: the files cannot be read.
        """
        examples = self.source(split)
        end = len(examples) if stop is None else stop
        for first in range(start, end, _READ_AHEAD):
            indices = range(first, min(first + _READ_AHEAD, end))
            try:
                fetched = _fetch(examples, list(indices))
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"split {self._splits[split]!r} of tfds:{self._name} cannot be read any further ({error}); "
                    "check its files"
                ) from None
            for index, example in zip(indices, fetched, strict=True):
                place = self.place(split, index)
                yield place, _checked(example, place)


class Records:
    """Random access to the examples of a split; malformed is one whose checksum does not hold."""

    def __init__(self, prepared: PreparedSet, split: Split):
        self._examples = prepared.source(split)
        self._place = functools.partial(prepared.place, split)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any] | Malformed:
        (example,) = _fetch(self._examples, [index])
        return _checked(example, self._place(index))

    def place(self, index: int) -> str:
        """What an error calls an example."""
        return self._place(index)


def _checked(example: Any, place: str) -> Any:
    return Malformed(place, str(example)[:_SHOWN]) if isinstance(example, RuntimeError) else example


def _fetch(examples: Any, indices: list[int]) -> list[Any]:
    """Examples by number, a RuntimeError in place of each whose checksum does not hold; others are raised."""
    try:
        return examples.__getitems__(indices)
    except RuntimeError as error:
        if not str(error).startswith("Corrupted"):
            raise
        if len(indices) == 1:
            return [error]
        return [example for index in indices for example in _fetch(examples, [index])]
