"""Sources of records with two splits: the sample in the package, local files, or a tfds set.

A malformed record keeps its index, so that repairing it moves no other record to another split.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from etils import epath

from ...base.errors import UserError
from ...dataset import Split
from . import files
from .malformed import Malformed
from .tfds import TfdsSet

T = TypeVar("T")
HELD_OUT_EVERY = 10  # sources without splits hold out every tenth record


class Source(Generic[T]):
    """Records of two splits in a fixed order.

    Args:
      fingerprint: text that changes when the records may have changed.
      records: yields all records of a split.
      fraction: returns the fraction (0 to 1) of its files that the newest stream has read, if it can tell.
    """

    def __init__(
        self,
        fingerprint: str,
        records: Callable[[Split], Iterator[T | Malformed]],
        fraction: Callable[[], float] = lambda: 0.0,
    ):
        self.fingerprint, self.fraction, self._records = fingerprint, fraction, records

    def count(self, split: Split) -> int | None:
        """Return the number of records of a split; None if only reading them all tells."""
        del split
        return None

    def stream(self, split: Split, start: int = 0, stop: int | None = None) -> Iterator[T | Malformed]:
        """Yield records `start` to `stop` of a split, malformed ones included."""
        return itertools.islice(self._records(split), start, stop)


def file_source(
    pattern: str, example: str, read: Callable[[epath.Path, files.ReadMeter], Iterator[T | Malformed]], options: Any
) -> Source[T]:
    """Open the files that a glob matches, in the order of their paths; every tenth record is held out.

    Args:
      pattern: text after "file:" in `data.source`.
      example: a glob for wanted files, for the error that a directory gives.
      read: yields the records of a file.
      options: anything with a fixed repr on which the records depend.

    Raises:
      UserError: no file matches, one cannot be read, or there are too few records.
    """
    found = files.find("data.source", pattern, example)
    meter = files.ReadMeter(found)

    def every() -> Iterator[T | Malformed]:
        for path in found:
            yield from read(path, meter)

    count = len(list(itertools.islice(every(), HELD_OUT_EVERY)))
    if count < HELD_OUT_EVERY:
        raise UserError(
            f"data.source='file:{pattern}': has {count} records and needs at least {HELD_OUT_EVERY}, because every "
            f"{HELD_OUT_EVERY}th is held out. Give more; form feeds separate the documents of a text file."
        )
    fingerprint = hashlib.sha256(repr((files.stats(found), options)).encode()).hexdigest()
    return Source(fingerprint, lambda split: every_tenth(every(), split), meter.fraction)


def every_tenth(records: Iterator[T], split: Split) -> Iterator[T]:
    """Yield every tenth record for "heldout", the others for "train"."""
    return (
        record
        for index, record in enumerate(records)
        if (index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == (split == "heldout")
    )


class TfdsSource(Source[T]):
    """Text features of a tfds set.

    Args:
      name, data_dir, train, heldout: see `TfdsSet`.
      features: features to read by the knob of `data` that names them.
      make: returns the record of the features' texts, in the order of `features`; records that are "" are skipped.
    """

    def __init__(
        self,
        name: str,
        data_dir: str,
        features: Mapping[str, str],
        make: Callable[..., T],
        *,
        train: str,
        heldout: str,
    ):
        self._set = TfdsSet(name, data_dir, features, train=train, heldout=heldout)
        self._features, self._make = list(features.values()), make
        super().__init__(self._set.fingerprint, self.stream)

    def count(self, split: Split) -> int:
        """See `Source.count`."""
        return self._set.count(split)

    def stream(self, split: Split, start: int = 0, stop: int | None = None) -> Iterator[T | Malformed]:
        """See `Source.stream`."""
        for place, example in self._set.stream(split, start, stop):
            if isinstance(example, Malformed):
                yield example
                continue
            try:
                record = self._make(*(example[feature].decode("utf-8") for feature in self._features))
            except UnicodeDecodeError as error:
                record = Malformed(place, f"not UTF-8 at byte {error.start}")
            if record != "":
                yield record
