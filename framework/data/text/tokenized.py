"""Base of data sets whose rows are tokens: where their records come from, and a tokenizer, given or trained once."""

import abc
import dataclasses
import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar

from etils import epath
from tokenizers import Tokenizer

from ...base import paths
from ...base.bounds import Within
from ...base.errors import UserError
from ...dataset import Split
from .. import samples
from ..preparing import manifests
from ..preparing.manifests import Manifest
from ..preparing.preparing import Preparable
from ..reading import files, saved
from ..reading.malformed import Malformed, Rejects
from ..reading.sources import Source, file_source, of_splits, split_source, tfds_source
from ..reading.tfds import TfdsSet
from .tokenizer import read_bytes


@dataclasses.dataclass(frozen=True)
class Tokenized(Preparable):
    """A data set with a tokenizer, of a vendored sample, local files or a prepared tfds set."""

    packing_knobs: ClassVar[tuple[str, ...]]  # knobs that the tokenizer does not depend on
    sample_file: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]  # of files that `read` can read
    feature_knobs: ClassVar[tuple[str, ...]]  # name the fields or tfds features that make a record
    record: ClassVar[Callable[..., Any]]  # makes a record of the texts of these features
    text_of: ClassVar[Callable[[Any], str]]  # the text of a record that decides whether a record of a file is held out

    source: str = ""  # the default of a subclass is its vendored sample
    data_dir: str = ""  # folder of tfds sets, local or gs://; "" uses $TFDS_DATA_DIR or ~/tensorflow_datasets
    train_split: str = "train"  # split of a tfds set or saved DatasetDict to train on
    heldout_split: str = "validation"  # split of these to evaluate on ("test" for lm1b)
    heldout_fraction: Annotated[float, Within(1e-9, 0.999)] = 0.1  # of the records of files, by a hash of their text
    max_records: Annotated[int, Within(0)] = 0  # per split, malformed ones included; 0 takes all
    tokenizer: str = ""  # tokenizers JSON file, local or gs://; "" trains one on the training records

    def __post_init__(self):
        super().__post_init__()
        kind, _, name = self.source.partition(":")
        sample = type(self).source
        if not name or (kind not in ("file", "tfds") and self.source != sample):
            raise ValueError(
                f"data.source={self.source!r}: write {sample}, file:/path/*{self.suffixes[0]} or tfds:NAME:VERSION"
            )

    @abc.abstractmethod
    def sample(self, split: Split) -> Iterator[Any]:
        """Yield the vendored records of a split."""

    @abc.abstractmethod
    def read(self, path: epath.Path) -> Iterator[Any | Malformed]:
        """Yield the records of a file."""

    def cut(self, path: epath.Path, size: int) -> Iterator[Any | Malformed]:
        """Yield the records of a file cut into parts of about `size` bytes, if they can be cut."""
        return self.read(path)

    @abc.abstractmethod
    def load(self, path: epath.Path) -> Tokenizer:
        """Read a tokenizer.

        Raises:
          UserError: it does not meet the requirements.
        """

    @abc.abstractmethod
    def train(self, records: Iterator[Any]) -> Tokenizer:
        """Train a tokenizer on the training records."""

    def open_source(self) -> Source:
        """See `Preparable.open_source`; reads only enough to know that the source is readable, and writes nothing."""
        kind, _, name = self.source.partition(":")
        blocks = self.shard_size, self.max_records
        if kind == "sample":
            return of_splits(samples.sha256(self.sample_file), self.sample, *blocks)
        if kind == "file" and paths.of(name).is_dir() and (known := saved.splits_of(paths.of(name))):
            return split_source(self._of_splits(name, known), self.read, *blocks)
        if kind == "file":
            found = self._ordered(files.find("data.source", name, self.suffixes))
            return file_source(found, self.read, self.cut, self.text_of, self.heldout_fraction, *blocks)
        features = self.keys
        splits: dict[Split, str] = {"train": self.train_split, "heldout": self.heldout_split}
        return tfds_source(TfdsSet(name, self.data_dir, features, splits), self.record, *blocks, mixed=self.grows)

    @property
    def keys(self) -> dict[str, str]:
        """The keys of the texts of a record, by knob."""
        return {knob: getattr(self, knob) for knob in self.feature_knobs}

    def _of_splits(self, folder: str, known: Sequence[str]) -> dict[Split, list[epath.Path]]:
        """Return the files of both splits of a saved DatasetDict."""
        wanted: dict[Split, str] = {"train": self.train_split, "heldout": self.heldout_split}
        for split, name in wanted.items():
            if name not in known:
                raise UserError(
                    f"data.{split}_split={name!r}: {folder} has the splits {', '.join(map(repr, known))}. Name one of "
                    f"them, or write file:{os.path.join(folder, known[0])} to hold out a fraction of one split."
                )
        if self.train_split == self.heldout_split:
            raise UserError(f"data.heldout_split={self.heldout_split!r}: is also data.train_split. Name another.")
        return {
            split: self._ordered(files.find("data.source", os.path.join(glob.escape(folder), name), self.suffixes))
            for split, name in wanted.items()
        }

    def _ordered(self, found: list[epath.Path]) -> list[epath.Path]:
        """Return files in the order in which to read them: training starts on the first."""
        return files.mixed(found) if self.grows else found

    def settings(self) -> dict[str, Any]:
        """See `Preparable.settings`; with the hash of the tokenizer's file in place of its path."""
        settings = super().settings()
        if self.tokenizer:
            settings["tokenizer"] = hashlib.sha256(read_bytes(self.tokenizer_file)).hexdigest()
        return settings

    @property
    def tokenizer_file(self) -> epath.Path:
        """The file of a given tokenizer; of a folder the tokenizers JSON file, or else the SentencePiece model."""
        path = paths.of(self.tokenizer)
        if not path.is_dir():
            return path
        return path / ("tokenizer.json" if (path / "tokenizer.json").exists() else "tokenizer.model")

    def make_tokenizer(self, cache: epath.Path, source: Source) -> str:
        """Return the path of the given tokenizer, or of the one in `cache`; train it if it is missing."""
        if self.tokenizer:
            self.load(self.tokenizer_file)
            return os.fspath(self.tokenizer_file)
        unrelated = {*self.packing_knobs, "shard_size"}
        own = {name: value for name, value in self.identity(source).items() if name not in unrelated}
        path = cache / f"tokenizer-{manifests.digest(own)}.json"
        if not path.exists():
            trained = self.train(Rejects(self.max_malformed).sift(source.records("train")))
            paths.write_text(path, trained.to_str(pretty=True))
        return os.fspath(path)

    def beside(self, training: "Tokenized", cache: str | os.PathLike[str]) -> "Tokenized":
        """Return this data set with the tokenizer of the training data, unless it has one of its own."""
        if self.tokenizer:
            return self
        folder, manifest = training.manifest(cache)
        return dataclasses.replace(self, tokenizer=os.fspath(folder.parent / manifest["tokenizer"]["file"]))

    def load_tokenizer(self, cache: str | os.PathLike[str]) -> Tokenizer:
        """Return the tokenizer that the rows were made with; the source may be missing.

        Raises:
          UserError: the tokenizer is missing or invalid.
        """
        if self.tokenizer:
            return self.load(self.tokenizer_file)
        place = paths.of(self.prepared or cache)
        found = [path for path in paths.listed(place) if path.name.startswith("tokenizer-") and path.suffix == ".json"]
        return self.load(found[0]) if len(found) == 1 else self.tokenizer_of(*self.manifest(cache))

    def tokenizer_of(self, folder: epath.Path, manifest: Manifest) -> Tokenizer:
        """Return the tokenizer of the rows of a folder."""
        own = folder.parent / manifest["tokenizer"]["file"]
        return self.load(self.tokenizer_file if self.tokenizer else own)
