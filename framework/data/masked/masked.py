"""Text for BERT: documents cut into pairs of texts once, in shards; then read by row at random and masked."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
from etils import epath

from ...base.bounds import Within
from ...base.errors import UserError
from ...dataset import SPLITS, Example, Source, Split
from ..preparing import manifests
from ..preparing.manifests import Manifest
from ..preparing.preparing import Tally
from ..reading.sources import Stream
from ..text.documents import DocumentData
from ..text.tokenizer import Tokenizer, refusing
from ..text.wordpiece import SMALLEST_VOCABULARY, Vocabulary, load_wordpiece, train_wordpiece, vocabulary_of
from .next_sentence import PairRow, groups, pairs, split_sentences

_PAIRS_SEED = 20_181_011  # of the pairs; independent of the run's seed
_MASKS_SEED = 20_190_524  # of the masks of held-out rows; independent of the run's seed
_GROUP = 1_000  # documents among which random second texts are drawn
_ALONE = "alone in the last shard"


@dataclasses.dataclass(frozen=True)
class MaskedTextData(DocumentData):
    """Documents as masked pairs of texts: [CLS] first text [SEP] second text [SEP] and padding.

    The cache holds `tokenizer-HASH.json` and `rows-HASH/`, named by a hash of the settings and the source. Rows are
    masked when they are read: training rows as a function of their step and place, held-out rows of their index.
    """

    version: ClassVar[int] = 3
    packing_knobs: ClassVar[tuple[str, ...]] = ("sequence_length", "short_rate")
    reading_knobs: ClassVar[tuple[str, ...]] = ("mask_rate", "predictions")

    sequence_length: Annotated[int, Within(8, 2**24)] = 128  # tokens in a row, including the three special ones
    vocab_size: Annotated[int, Within(SMALLEST_VOCABULARY, 2**24)] = 30_522  # tokens, including the five special ones
    mask_rate: Annotated[float, Within(1e-9, 0.999)] = 0.15  # share of a row's tokens to predict
    predictions: Annotated[int, Within(1)] = 20  # most tokens to predict in a row; fixes the shapes
    short_rate: Annotated[float, Within(0, 1)] = 0.1  # share of the pairs that are made short on purpose
    lower_case: bool = True  # the tokenizer trained here lower-cases text and strips accents
    train_split: str = "train[:99%]"  # tfds split to train on; Wikipedia has only "train"
    heldout_split: str = "train[99%:]"  # tfds split to evaluate on
    tokenizer: str = ""  # tokenizers JSON file, WordPiece; "" trains one on the training documents

    def __post_init__(self):
        super().__post_init__()
        if self.predictions >= self.sequence_length:
            raise ValueError(
                f"data.predictions={self.predictions}: must be less than data.sequence_length={self.sequence_length}"
            )

    @property
    def tokens_per_example(self) -> int:
        """Slots of a row."""
        return self.sequence_length

    def load(self, path: epath.Path) -> Tokenizer:
        """See `Tokenized.load`."""
        return load_wordpiece(path, self.vocab_size)

    def train(self, records: Iterator[str]) -> Tokenizer:
        """See `Tokenized.train`."""
        return train_wordpiece(records, self.vocab_size, lower_case=self.lower_case)

    def rows(
        self, stream: Stream, number: int, records: Iterator[str], tokenizer: str, tally: Tally
    ) -> Iterator[bytes]:
        """See `Preparable.rows`; second texts come from the same shard; a document alone in the last shard is dropped.

        Raises:
          UserError: a split has a single document.
        """
        loaded = self.load(epath.Path(tokenizer))

        def tokenized() -> Iterator[list[np.ndarray]]:
            for text in records:
                sentences = split_sentences(text)
                with refusing(f"the tokenizer fails on the document {text[:40]!r}...; use another"):
                    encodings = loaded.encode_batch_fast(sentences, add_special_tokens=False)
                tokens = [np.array(each.ids, np.int32) for each in encodings if each.ids]
                tally.counts.update(documents=1, characters=len(text), tokens=sum(map(len, tokens)))
                yield tokens

        split: Split = stream.split or "train"
        # Shard 0 has the random numbers of [seed, split]: a SeedSequence ignores trailing zeros.
        rng = np.random.default_rng([_PAIRS_SEED, SPLITS.index(split), number])
        row = PairRow(vocabulary_of(loaded), self.sequence_length)
        for group in groups(tokenized(), _GROUP):
            if len(group) < 2:
                if number:
                    tally.dropped[_ALONE] += 1
                    return
                raise UserError(
                    f"data.source={self.source!r}: has 1 document to use in its {split} split and needs at least 2, "
                    "because second texts are drawn from other documents. Give more."
                )
            for pair in pairs(group, capacity=self.sequence_length - 3, short_rate=self.short_rate, rng=rng):
                yield row.to_bytes(pair)

    def row_decoder(self, split: Split, folder: epath.Path, manifest: Manifest) -> PairRow:
        """See `Preparable.row_decoder`."""
        return PairRow(vocabulary_of(self.tokenizer_of(folder, manifest)), self.sequence_length)

    def examples(self, split: Split, cache: str | os.PathLike[str]) -> Source:
        """See `Preparable.examples`; `augment` masks the rows of "train"."""
        unmasked: Any = super().examples(split, cache)
        return unmasked if split == "train" else MaskedRows(unmasked, self)

    def augment(self, example: Example, rng: np.random.Generator) -> Example:
        """Return a row of `PairRow` with masks: the arrays of `spec`."""
        vocabulary = Vocabulary(*example["vocabulary"].tolist())
        tokens, segments = example["tokens"], example["segments"]
        masks = masked_row(tokens, segments, vocabulary, rng, rate=self.mask_rate, predictions=self.predictions)
        return {name: array for name, array in example.items() if name != "vocabulary"} | masks

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shape and type of the arrays of a masked row."""
        row, prediction = (self.sequence_length,), (self.predictions,)
        shapes = {"tokens": row, "segments": row, "is_next": ()}
        shapes |= {"masked_positions": prediction, "masked_tokens": prediction}
        return {name: jax.ShapeDtypeStruct(shape, np.int32) for name, shape in shapes.items()}

    def fingerprint(self, cache: str | os.PathLike[str]) -> str:
        """See `Preparable.fingerprint`; masking knobs change it, too."""
        return manifests.digest([super().fingerprint(cache), self.mask_rate, self.predictions])


class MaskedRows:
    """Rows masked as a function of their index alone."""

    in_workers = True

    def __init__(self, rows: Any, data: MaskedTextData):
        self._rows, self._data = rows, data

    def __repr__(self) -> str:
        return repr(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        rows = zip(self._rows.__getitems__(indices), indices, strict=True)
        return [self._data.augment(row, np.random.default_rng([_MASKS_SEED, index])) for row, index in rows]


def masked_row(
    tokens: np.ndarray,
    segments: np.ndarray,
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    *,
    rate: float,
    predictions: int,
) -> Example:
    """Mask `rate` of a row's real tokens, at least one and at most `predictions`.

    The masked tokens are drawn without repetition. Each independently becomes [MASK] with probability 80 %, a random
    token with 10 %, or stays. Special tokens, including [UNK], are neither masked nor inserted, but count among the
    real tokens, as published.

    Args:
      tokens: ids, int32 [T].
      segments: 0 for padding, int32 [T].
      vocabulary: vocabulary of the ids.
      rng: source of all randomness.
      rate: share of the tokens; 0.15 as published.
      predictions: P.

    Returns:
      tokens [T], masked_positions [P] in ascending order and then 0, masked_tokens [P], int32.
    """
    special = np.sort(vocabulary[1:])
    places = np.flatnonzero((segments > 0) & ~np.isin(tokens, special))
    wanted = min(predictions, max(1, round(rate * int((segments > 0).sum()))), len(places))
    chosen = np.sort(rng.permutation(places)[:wanted])
    others = rng.integers(vocabulary.size - len(special), size=wanted)
    for token in special:
        others += others >= token
    throws = rng.random(wanted)
    original = tokens[chosen]
    replaced = tokens.copy()
    replaced[chosen] = np.where(throws < 0.8, vocabulary.mask, np.where(throws < 0.9, others, original))
    fill = (0, predictions - wanted)
    return {
        "tokens": replaced.astype(np.int32),
        "masked_positions": np.pad(chosen, fill).astype(np.int32),
        "masked_tokens": np.pad(original, fill).astype(np.int32),
    }
