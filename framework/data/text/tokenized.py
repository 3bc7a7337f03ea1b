"""What data sets have in common whose rows are tokens: a tokenizer, given or trained once beside the rows."""

import abc
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator
from typing import Any, ClassVar

from etils import epath
from tokenizers import Tokenizer

from ...base import paths
from ...base.errors import UserError
from ...dataset import SPLITS
from ..preparing import manifests
from ..preparing.jobs import Ingredients
from ..preparing.manifests import Manifest
from ..preparing.preparing import Preparable
from ..preparing.streams import Stream, of_split
from ..reading.records import Rejects


@dataclasses.dataclass(frozen=True)
class Tokenized(Preparable):
    """A data set with a tokenizer."""

    row_settings: ClassVar[tuple[str, ...]]  # settings that a tokenizer is not trained anew for

    tokenizer: str = ""  # tokenizers JSON file, local or gs://; "" trains one on the training records

    @abc.abstractmethod
    def load(self, path: epath.Path) -> Tokenizer:
        """Read a tokenizer.

        Raises:
          UserError: it cannot serve.
        """

    @abc.abstractmethod
    def train(self, records: Iterator[Any]) -> Tokenizer:
        """A tokenizer of the training records."""

    @property
    @abc.abstractmethod
    def limit(self) -> int:
        """Records of a split that are read; 0 takes all."""

    def streams(self, source: Any) -> list[Stream]:
        """See `Preparable.streams`; those held out come first, for what is wrong with them is known in seconds."""
        return [of_split(source, split, self.shard_size, self.limit) for split in reversed(SPLITS)]

    def ingredients(self, cache: epath.Path, source: Any) -> Ingredients:
        """The tokenizer: the one given, or that in `cache`, trained if it is not there."""
        if self.tokenizer:
            path = paths.of(self.tokenizer)
            self.load(path)
        else:
            settings = self._identity(source)
            own = {name: value for name, value in settings.items() if name not in (*self.row_settings, "shard_size")}
            path = cache / f"tokenizer-{manifests.digest(own)}.json"
            if not path.exists():
                records = itertools.islice(source.stream("train"), self.limit or None)
                trained = self.train(Rejects(self.max_malformed).sift(records))
                paths.write_text(path, trained.to_str(pretty=True))
        return Ingredients(os.fspath(path), hashlib.sha256(path.read_bytes()).hexdigest())

    def load_tokenizer(self, cache: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer that the rows are made with; the source need not be there any more.

        Raises:
          UserError: it is not to be found, or no tokenizer.
        """
        if self.tokenizer:
            return self.load(paths.of(self.tokenizer))
        place = paths.of(self.prepared or cache)
        found = list(place.glob("tokenizer-*.json")) if place.exists() else []
        return self.load(found[0] if len(found) == 1 else self.tokenizer_of(*self.manifest(cache)))

    def tokenizer_of(self, folder: epath.Path, manifest: Manifest) -> epath.Path:
        """The file of the tokenizer that rows are made with."""
        return paths.of(self.tokenizer) if self.tokenizer else folder.parent / manifest["tokenizer"]["file"]

    def tokenizer_digest(self) -> str:
        """Hash of the file that `data.tokenizer` names, "" for none.

        Raises:
          UserError: it cannot be read.
        """
        if not self.tokenizer:
            return ""
        try:
            return hashlib.sha256(paths.of(self.tokenizer).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(
                f"data.tokenizer {self.tokenizer} cannot be read ({error.strerror or error}); check the path"
            ) from error
