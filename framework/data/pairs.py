"""Sentence pairs for translation: tokenized once into the cache by a vocabulary of both languages, read by row."""

import collections
import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..errors import UserError
from ..workdir import read_json
from . import packing
from .contract import Decoder
from .pair_packing import COLUMNS, END, PackedPairs, Room, TokenPair, write_pairs
from .pair_sources import Pair, Pairs, open_pairs
from .records import Rejects
from .splits import SPLITS, Split
from .tokenizer import END_OF_DOCUMENT, SMALLEST_VOCABULARY, Tokenizer, encode, load_tokenizer, train_tokenizer

# Part of every cache name: raise it when the meaning of cached files changes.
_CACHE_FORMAT = 1
_TOO_LONG, _EMPTY, _REPEATED = "too long for a row", "with an empty side", "whose source is trained on"


@dataclasses.dataclass(frozen=True)
class PairData:
    """Sentence pairs from the vendored sample, local TSV files or a prepared tfds set, as rows of fixed lengths.

    A row to train on holds one pair or several, one to be judged by holds one. The cache holds `tokenizer-HASH.json`
    and `pairs-HASH/`, named by a hash of the settings and of the source, so that other settings or a changed source
    never meet old files.
    """

    source: str = "sample:nt"  # or "tfds:wmt14_translate/fr-en:1.0.0", "file:/path/*.tsv"
    source_length: int = 128  # source tokens in a row, the end of each sentence included
    target_length: int = 128  # target tokens in a row, likewise
    pairs_per_row: int = 0  # most pairs in a row that is trained on; 0 is as many as fit, which wastes least
    vocab_size: int = 2048  # tokens of both languages together, the end of a sentence and the 256 bytes included
    data_dir: str = ""  # where tfds sets lie, local or gs://; "" is $TFDS_DATA_DIR or ~/tensorflow_datasets
    source_key: str = "en"  # feature of a tfds set that is translated from; supervised order is no matter
    target_key: str = "fr"  # feature of a tfds set that is translated into
    source_column: int = 1  # of a .tsv file, the column that is translated from; the first is 1
    target_column: int = 2  # of a .tsv file, the column that is translated into
    train_split: str = "train"  # tfds split to train on
    heldout_split: str = "test"  # tfds split or chapters of the sample to evaluate on; files use every 10th row
    tokenizer: str = ""  # tokenizers JSON file, byte-level BPE; "" trains one on both sides of the training pairs
    max_pairs: int = 0  # per split, for rows and for training the tokenizer; 0 takes all
    max_malformed: int = 0  # pairs of a split that may be skipped; 0, so that nobody's data shrink unasked

    def __post_init__(self):
        if self.source.partition(":")[0] not in ("sample", "file", "tfds"):
            raise ValueError(
                f"data.source is {self.source!r}; write 'sample:nt', 'file:/path/*.tsv' or "
                "'tfds:wmt14_translate/fr-en:1.0.0'"
            )
        for name, least in (("source_length", 2), ("target_length", 2), ("source_column", 1), ("target_column", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("pairs_per_row", "max_pairs", "max_malformed"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must not be negative")
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(f"data.vocab_size is {self.vocab_size}; bytes alone need {SMALLEST_VOCABULARY}")

    @property
    def tokens_per_example(self) -> int:
        """Target slots of a row."""
        return self.target_length

    def prepare(self, cache: Path) -> None:
        """Train the tokenizer and tokenize both splits into `cache`, unless they are there already.

        For one process, before any other reads. Streams the source; a failure leaves no partial rows behind. Malformed
        pairs are skipped; pairs with an empty side are dropped, and training pairs that are longer than a row; of
        sources without official splits also held-out pairs whose source is trained on. How many is said on stderr, also
        where the rows are there already.

        Raises:
          UserError: the source or the tokenizer file cannot be used, or a held-out pair is longer than a row, and
            nothing but a tokenizer has been written; or a split has more than `max_malformed` malformed pairs.
        """
        pairs = self._open()
        place = self._place(cache, pairs)
        if place.exists():
            for split in SPLITS:
                rejects, dropped = self._stamp(place)[1][split]
                rejects.refuse_excess()
                _say(split, rejects, dropped)
            return
        tokenizer = self._given_tokenizer() or self._trained_tokenizer(cache, pairs)
        with packing.AtomicDirectory(place) as partial:
            # Held-out pairs first: what is wrong with them is known in seconds.
            totals = {split: self._write_split(partial, split, pairs, tokenizer) for split in reversed(SPLITS)}
            stamp = {
                "settings": self._settings(pairs),
                "content": _hash([tokenizer.to_str(), *(totals[split]["content"] for split in SPLITS)]),
            }
            packing.write_json(partial / "stamp.json", stamp | totals)

    def examples(self, split: Split, cache: Path) -> PackedPairs:
        """The rows of a split that `prepare` has made: random access, picklable.

        Raises:
          UserError: nothing is prepared for these settings in `cache`.
        """
        return PackedPairs(self._prepared(cache) / split, self._room(split))

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of a row's arrays."""
        return {
            name: jax.ShapeDtypeStruct(
                (self.source_length if name.startswith("source") else self.target_length + 1,), np.int32
            )
            for name in COLUMNS
        }

    def fingerprint(self, cache: Path) -> str:
        """Hash of the tokenizer and of both splits' rows: files that were copied or touched do not change it.

        Raises:
          UserError: nothing is prepared for these settings in `cache`.
        """
        return self._stamp(self._prepared(cache))[0]

    def decoder(self, cache: Path) -> Decoder:
        """Turns token ids into text, up to the first end."""
        tokenizer = self.load_tokenizer(cache)

        def decode(tokens: np.ndarray) -> str:
            ends = np.flatnonzero(tokens == END)
            return tokenizer.decode(tokens[: ends[0] if len(ends) else None].tolist(), skip_special_tokens=False)

        return decode

    def load_tokenizer(self, cache: Path) -> Tokenizer:
        """The tokenizer that the rows were made with; the source need not be there any more while the cache has one.

        Raises:
          UserError: it is not to be found, or no tokenizer.
        """
        given = self._given_tokenizer()
        if given is not None:
            return given
        found = list(cache.glob("tokenizer-*.json"))
        path = found[0] if len(found) == 1 else self._tokenizer_path(cache, self._open())
        return load_tokenizer(path, self.vocab_size)

    def _open(self) -> Pairs:
        return open_pairs(
            self.source,
            data_dir=self.data_dir,
            source_key=self.source_key,
            target_key=self.target_key,
            source_column=self.source_column,
            target_column=self.target_column,
            train_split=self.train_split,
            heldout_split=self.heldout_split,
        )

    def _room(self, split: Split) -> Room:
        return Room(self.source_length, self.target_length, self.pairs_per_row if split == "train" else 1)

    def _stream(self, pairs: Pairs, split: Split, rejects: Rejects) -> Iterator[Pair]:
        return itertools.islice(rejects.sift(pairs.stream(split)), self.max_pairs or None)

    def _write_split(self, directory: Path, split: Split, pairs: Pairs, tokenizer: Tokenizer) -> dict[str, Any]:
        rejects, room, dropped = Rejects(self.max_malformed), self._room(split), collections.Counter[str]()
        progress = packing.Progress(f"tokenizing {split}", rejects, "pairs")
        repeated = set() if split == "train" or pairs.official else self._trained_on(pairs)
        longest = (0, 0)

        def kept() -> Iterator[Pair]:
            for pair in self._stream(pairs, split, rejects):
                if not (pair.source and pair.target):
                    dropped[_EMPTY] += 1
                elif pair.source in repeated:
                    dropped[_REPEATED] += 1
                else:
                    yield pair

        def fitting() -> Iterator[TokenPair]:
            nonlocal longest
            for pair, source, target in _tokens(tokenizer, kept()):
                progress.add(len(pair.source) + len(pair.target), len(source) + len(target))
                if room.holds(1, len(source), len(target)):
                    yield source, target
                else:
                    dropped[_TOO_LONG] += 1
                    longest = max(longest[0], len(source) + 1), max(longest[1], len(target) + 1)

        count, content = write_pairs(directory / split, fitting(), room, self.vocab_size)
        totals = progress.finish(count, self.target_length)
        if split == "heldout" and dropped[_TOO_LONG]:
            raise UserError(
                f"{dropped[_TOO_LONG]} held-out pairs are longer than a row: they have up to {longest[0]} source and "
                f"{longest[1]} target tokens, data.source_length is {self.source_length} and data.target_length "
                f"{self.target_length}; raise these, for held-out pairs are never cut"
            )
        _say(split, rejects, dropped)
        return totals | {"content": content, "dropped": dict(dropped)}

    def _trained_on(self, pairs: Pairs) -> set[str]:
        """The held-out sources that are trained on, too."""
        ignored = Rejects(self.max_malformed)
        heldout = {pair.source for pair in self._stream(pairs, "heldout", ignored)}
        ignored = Rejects(self.max_malformed)
        return {pair.source for pair in self._stream(pairs, "train", ignored) if pair.source in heldout}

    def _given_tokenizer(self) -> Tokenizer | None:
        if not self.tokenizer:
            return None
        tokenizer = load_tokenizer(Path(self.tokenizer).expanduser(), self.vocab_size)
        end = tokenizer.token_to_id(END_OF_DOCUMENT)
        if end != END:
            raise UserError(
                f"data.tokenizer {self.tokenizer} has {END_OF_DOCUMENT} as token {end}; pairs need it as token {END}"
            )
        return tokenizer

    def _trained_tokenizer(self, cache: Path, pairs: Pairs) -> Tokenizer:
        path = self._tokenizer_path(cache, pairs)
        if not path.exists():
            texts = itertools.chain.from_iterable(self._stream(pairs, "train", Rejects(self.max_malformed)))
            trained = train_tokenizer(filter(None, texts), self.vocab_size)
            cache.mkdir(parents=True, exist_ok=True)
            packing.write_atomically(path, trained.to_str(pretty=True))
        return load_tokenizer(path, self.vocab_size)

    def _prepared(self, cache: Path) -> Path:
        place = self._place(cache, self._open())
        if not place.exists():
            raise UserError(f"{cache} holds no pairs for {self.source} with these settings; call prepare first")
        return place

    def _stamp(self, place: Path) -> tuple[str, dict[Split, tuple[Rejects, dict[str, int]]]]:
        """What `prepare` has noted: the hash of the content, and what each split has skipped and dropped."""
        try:
            stamp = read_json(place / "stamp.json") or {}
            left_out: dict[Split, tuple[Rejects, dict[str, int]]] = {
                split: (Rejects(self.max_malformed, **stamp[split]["malformed"]), dict(stamp[split]["dropped"]))
                for split in SPLITS
            }
            return stamp["content"], left_out
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{place}/stamp.json is damaged; remove {place}, and it is made again") from error

    def _settings(self, pairs: Pairs) -> dict[str, str | int]:
        """What decides the content of the rows; `max_malformed` only decides whether there are any."""
        given = self._given_tokenizer()
        return {
            "format": _CACHE_FORMAT,
            "source": self.source,
            "fingerprint": pairs.fingerprint,
            "vocab_size": self.vocab_size,
            "max_pairs": self.max_pairs,
            "tokenizer": _hash(given.to_str()) if given else "",
            "source_length": self.source_length,
            "target_length": self.target_length,
            "pairs_per_row": self.pairs_per_row,
        }

    def _place(self, cache: Path, pairs: Pairs) -> Path:
        return cache / f"pairs-{_hash(self._settings(pairs))}"

    def _tokenizer_path(self, cache: Path, pairs: Pairs) -> Path:
        rows = ("source_length", "target_length", "pairs_per_row")
        settings = {name: value for name, value in self._settings(pairs).items() if name not in rows}
        return cache / f"tokenizer-{_hash(settings)}.json"


def _tokens(tokenizer: Tokenizer, pairs: Iterable[Pair]) -> Iterator[tuple[Pair, np.ndarray, np.ndarray]]:
    """Pairs with the tokens of both sides, without ends."""
    kept, sources, targets = itertools.tee(pairs, 3)
    encoded = (
        encode(tokenizer, (pair.source for pair in sources)),
        encode(tokenizer, (pair.target for pair in targets)),
    )
    for pair, (_, source), (_, target) in zip(kept, *encoded, strict=True):
        yield pair, source[1:-1], target[1:-1]


def _say(split: Split, rejects: Rejects, dropped: dict[str, int]) -> None:
    if rejects.count:
        print(f"{split} pairs: {rejects}, skipped", file=sys.stderr, flush=True)
    if any(dropped.values()):
        counts = ", ".join(f"{count:,} {why}" for why, count in dropped.items() if count)
        print(f"{split} pairs: {counts}; dropped", file=sys.stderr, flush=True)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
