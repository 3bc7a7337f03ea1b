"""Pairs of texts for BERT: in half of them the second text follows the first, in the others it comes from elsewhere.

The published algorithm (google-research/bert, create_pretraining_data.py): sentences are gathered until a row is full
and cut at a sentence end into a first and a second text. With probability 1/2, or if there is only one sentence, the
second is replaced by text from a random place of another document, and the sentences cut off go into the next row.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...dataset import Example
from ..text.wordpiece import Vocabulary

Sentence = np.ndarray  # token ids, int32 [length >= 1]
# A line break, or white space after . ! ? (and a closing quote or bracket) unless a small letter follows.
_SENTENCE_END = re.compile(r"""\s*[\n\r\f]\s*|(?<=[.!?])\s+(?![a-z])|(?<=[.!?]["')\]\u2019\u201d])\s+(?![a-z])""")


class Pair(NamedTuple):
    """Two texts, int32 [length >= 1] each, and whether the second follows the first."""

    first: np.ndarray
    second: np.ndarray
    is_next: bool


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a document, stripped of white space.

    A sentence ends at a line break, and at white space after ".", "!" or "?" (a closing quote or bracket may stand
    between) unless a small letter a-z follows. "U.S. Army" is cut in two, which does no harm here.
    """
    return [sentence for part in _SENTENCE_END.split(text) if (sentence := part.strip())]


def pairs(
    documents: Sequence[Sequence[Sentence]], *, capacity: int, short_rate: float, rng: np.random.Generator
) -> Iterator[Pair]:
    """Yield the pairs of a group of documents, in order.

    Args:
      documents: at least two, each of at least one sentence.
      capacity: largest number of tokens of both texts together.
      short_rate: share of the pairs that aim at a random length from 2 on, so that the model sees short texts.
      rng: source of all randomness.
    """
    for number, document in enumerate(documents):
        start = 0
        while start < len(document):
            aim = int(rng.integers(2, capacity + 1)) if rng.random() < short_rate else capacity
            end = _reach(document, start, aim)
            cut = start + int(rng.integers(1, end - start)) if end - start > 1 else end
            first = np.concatenate(document[start:cut])
            is_next = bool(end - start > 1 and rng.random() < 0.5)
            if is_next:
                second = np.concatenate(document[cut:end])
            else:
                other = int(rng.integers(len(documents) - 1))
                elsewhere = documents[other + (other >= number)]
                begin = int(rng.integers(len(elsewhere)))
                second = np.concatenate(elsewhere[begin : _reach(elsewhere, begin, aim - len(first))])
            yield Pair(*_shortened(first, second, capacity, rng), is_next)
            start = end if is_next else cut


def groups(documents: Iterable[list[Sentence]], size: int) -> Iterator[list[list[Sentence]]]:
    """Yield groups of `size` documents without empty ones; the last group has 2 to `size` + 1 documents.

    A single document is a group of one.
    """
    held: list[list[Sentence]] = []
    for document in documents:
        if not document:
            continue
        if len(held) == size + 1:
            yield held[:size]
            held = held[size:]
        held.append(document)
    if held:
        yield held


def _reach(document: Sequence[Sentence], start: int, aim: int) -> int:
    """Return the end of the sentences from `start` on that together have `aim` tokens; at least one sentence."""
    end, length = start, 0
    while end < len(document) and (length < aim or end == start):
        length += len(document[end])
        end += 1
    return end


def _shortened(
    first: np.ndarray, second: np.ndarray, capacity: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Remove tokens from random ends of the longer text until both have `capacity` tokens together."""
    bounds = [[0, len(first)], [0, len(second)]]
    while (lengths := [end - start for start, end in bounds])[0] + lengths[1] > capacity:
        longer = bounds[0] if lengths[0] > lengths[1] else bounds[1]
        if rng.random() < 0.5:
            longer[0] += 1
        else:
            longer[1] -= 1
    return first[slice(*bounds[0])], second[slice(*bounds[1])]


class PairRow:
    """Converts pairs of texts to rows of a shard, and rows to unmasked examples.

    A row on disk: its tokens in the smallest type that holds them, and int32 the ends of the first text and of the row,
    and whether the second text follows.

    Args:
      vocabulary: vocabulary of the tokens.
      length: tokens of a row.
    """

    def __init__(self, vocabulary: Vocabulary, length: int):
        self._vocabulary = vocabulary
        tokens = np.min_scalar_type(vocabulary.size - 1)
        self._type = np.dtype([("tokens", tokens, length), ("bounds", np.int32, 3)])

    def to_bytes(self, pair: Pair) -> bytes:
        """Return the bytes of [CLS] first text [SEP] second text [SEP] and padding."""
        start, separator = ([each] for each in (self._vocabulary.start, self._vocabulary.separator))
        tokens = np.concatenate([start, pair.first, separator, pair.second, separator])
        row = np.full((), self._vocabulary.pad, self._type)
        row["tokens"][: len(tokens)] = tokens
        row["bounds"] = len(pair.first) + 2, len(tokens), pair.is_next
        return row.tobytes()

    def __call__(self, contents: Sequence[bytes]) -> list[Example]:
        """Return unmasked rows, int32 arrays.

        tokens [T]; segments [T], 1 for [CLS], the first text and its [SEP], 2 for the second text and its [SEP], 0 for
        padding; is_next, 1 if the second text follows the first; vocabulary, the fields of `Vocabulary`.
        """
        return [self._example(row) for row in np.frombuffer(b"".join(contents), self._type)]

    def _example(self, row: Any) -> Example:
        first, end, is_next = row["bounds"].tolist()
        segments = np.zeros(len(row["tokens"]), np.int32)
        segments[:first], segments[first:end] = 1, 2
        return {
            "tokens": row["tokens"].astype(np.int32),
            "segments": segments,
            "is_next": np.array(is_next, np.int32),
            "vocabulary": np.array(self._vocabulary, np.int32),
        }
