"""Base of data sets whose rows are tokens: a tokenizer, given or trained once beside the rows."""

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
from ..preparing.manifests import Manifest
from ..preparing.preparing import Ingredients, Preparable
from ..preparing.streams import Stream, of_split
from ..reading.malformed import Rejects


@dataclasses.dataclass(frozen=True)
class Tokenized(Preparable):
    """A data set with a tokenizer. The knob `max_<noun>` limits the records of a split that are read; 0 takes all."""

    packing_knobs: ClassVar[tuple[str, ...]]  # knobs that the tokenizer does not depend on

    tokenizer: str = ""  # tokenizers JSON file, local or gs://; "" trains one on the training records

    @abc.abstractmethod
    def load(self, path: epath.Path) -> Tokenizer:
        """Read a tokenizer.

        Raises:
          UserError: it does not meet the requirements.
        """

    @abc.abstractmethod
    def train(self, records: Iterator[Any]) -> Tokenizer:
        """Train a tokenizer on the training records."""

    def streams(self, source: Any) -> list[Stream]:
        """See `Preparable.streams`; held-out records come first, so that errors in them show within seconds."""
        return [of_split(source, split, self.shard_size, self._limit) for split in reversed(SPLITS)]

    def settings(self) -> dict[str, Any]:
        """See `Preparable.settings`; with the hash of the tokenizer's file in place of its path."""
        settings = super().settings()
        if self.tokenizer:
            try:
                content = paths.of(self.tokenizer).read_bytes()
            except OSError as error:
                raise UserError(
                    f"data.tokenizer={self.tokenizer}: cannot be read ({error.strerror or error})"
                ) from error
            settings["tokenizer"] = hashlib.sha256(content).hexdigest()
        return settings

    def ingredients(self, cache: epath.Path, source: Any) -> Ingredients:
        """Return the given tokenizer, or the one in `cache`; train it if it is missing."""
        if self.tokenizer:
            path = paths.of(self.tokenizer)
            self.load(path)
        else:
            unrelated = {*self.packing_knobs, "shard_size"}
            own = {name: value for name, value in self.identity(source).items() if name not in unrelated}
            path = cache / f"tokenizer-{manifests.digest(own)}.json"
            if not path.exists():
                records = itertools.islice(source.stream("train"), self._limit or None)
                trained = self.train(Rejects(self.max_malformed).sift(records))
                paths.write_text(path, trained.to_str(pretty=True))
        return Ingredients(os.fspath(path), hashlib.sha256(path.read_bytes()).hexdigest())

    def load_tokenizer(self, cache: str | os.PathLike[str]) -> Tokenizer:
        """Return the tokenizer that the rows were made with; the source may be missing.

        Raises:
          UserError: the tokenizer is missing or invalid.
        """
        if self.tokenizer:
            return self.load(paths.of(self.tokenizer))
        place = paths.of(self.prepared or cache)
        found = list(place.glob("tokenizer-*.json")) if place.exists() else []
        return self.load(found[0] if len(found) == 1 else self.tokenizer_path(*self.manifest(cache)))

    def tokenizer_path(self, folder: epath.Path, manifest: Manifest) -> epath.Path:
        """Return the path of the tokenizer that the rows were made with."""
        return paths.of(self.tokenizer) if self.tokenizer else folder.parent / manifest["tokenizer"]["file"]

    @property
    def _limit(self) -> int:
        return getattr(self, f"max_{self.noun}")
