"""Pairs of texts for BERT: half of them follow each other in a document, in the others the second comes from elsewhere.

The published algorithm (google-research/bert, create_pretraining_data.py): sentences are gathered until a row is full
and cut at one of their ends into a first and a second text. With probability 1/2, or where there is only one sentence,
the second is replaced by text from a random place of another document, and what was cut off goes into the next row.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

Sentence = np.ndarray  # token ids, int32 [length >= 1]
# A line break, or white space after . ! ? (and a quote or bracket that closes there) before what is no small letter.
_SENTENCE_END = re.compile(r"""\s*[\n\r\f]\s*|(?<=[.!?])\s+(?![a-z])|(?<=[.!?]["')\]\u2019\u201d])\s+(?![a-z])""")


class Pair(NamedTuple):
    """Two texts, int32 [length >= 1] each, and whether the second follows the first."""

    first: np.ndarray
    second: np.ndarray
    is_next: bool


def split_sentences(text: str) -> list[str]:
    """The sentences of a document, without white space around them.

    A sentence ends at a line break, and at white space after ".", "!" or "?" (a closing quote or bracket may stand
    between) unless a small letter a-z follows. "U.S. Army" is cut in two; for pairs of texts that does no harm.
    """
    return [sentence for part in _SENTENCE_END.split(text) if (sentence := part.strip())]


def pairs(
    documents: Sequence[Sequence[Sentence]], *, capacity: int, short_rate: float, rng: np.random.Generator
) -> Iterator[Pair]:
    """The pairs of a group of documents, in their order.

    Args:
      documents: each of at least one sentence; two at least, for random texts come from another one.
      capacity: tokens of both texts together, at most.
      short_rate: share of the pairs that aim at a random length from 2 on, so that short texts are seen too.
      rng: what everything random is drawn from.
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
    """`size` documents at a time, those without a sentence left out; the last group has one more or fewer, 2 at least.

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
    """The end of the sentences from `start` on that together have `aim` tokens, one at least."""
    end, length = start, 0
    while end < len(document) and (length < aim or end == start):
        length += len(document[end])
        end += 1
    return end


def _shortened(
    first: np.ndarray, second: np.ndarray, capacity: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Both texts less tokens from random ends of the longer one, until they have `capacity` tokens together."""
    bounds = [[0, len(first)], [0, len(second)]]
    while (lengths := [end - start for start, end in bounds])[0] + lengths[1] > capacity:
        longer = bounds[0] if lengths[0] > lengths[1] else bounds[1]
        if rng.random() < 0.5:
            longer[0] += 1
        else:
            longer[1] -= 1
    return first[slice(*bounds[0])], second[slice(*bounds[1])]
