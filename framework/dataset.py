"""The contract between the trainer and a data set: write a frozen dataclass with the methods of `Data`.

A config names it by import string, `config.data.name = "my_project.my_data:MyData"`; its fields are knobs. A data set
may also have `grows`, `ahead`, `prepare_some`, `fingerprint`, `augment`, `decoder`, `codec`, `spec` and `beside`; the
functions of these names below call them, or return a default for a data set without them.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Literal, Protocol

import jax
import numpy as np

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
Example = dict[str, np.ndarray]
Augment = Callable[[Example, np.random.Generator], Example]
Decoder = Callable[[np.ndarray], str]


@dataclasses.dataclass(frozen=True)
class Codec:
    """Text to tokens and back, for a model that continues texts.

    Attributes:
      encode: tokens of the beginning of a document, with those that begin every document.
      decode: text of tokens, without special ones; the bytes of an incomplete character become U+FFFD.
      ends: tokens that end a document.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    ends: Collection[int]


class Source(Protocol):
    """Random access to examples of fixed shapes, without a batch dimension; several threads read at once.

    A source may also have `__getitems__(indices) -> examples`, for rows that one call reads faster than several;
    `stacked(indices) -> {name: [indices, ...]}`, for those that are faster read into arrays, or `stacked = None`; and
    `in_workers = True`, if examples take much Python and the source is small when pickled, so that worker processes
    read large data sets by default.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Data(Protocol):
    """The methods that every data set must have."""

    @property
    def tokens_per_example(self) -> int:
        """Return the number of tokens that one example trains on, 1 for data that are not text."""
        ...

    def prepare(self, cache: Path) -> None:
        """Write the files that `examples` needs to the run's folder `cache`; one process calls it before any reads.

        Raises:
          UserError: the data cannot be used.
        """
        ...

    def examples(self, split: Split, cache: Path) -> Source:
        """Return random access to the examples of a split; `cache` is the folder that `prepare` has filled."""
        ...


def prepare(data: Data, cache: Path, examples: int = 0, seconds: float = 0) -> None:
    """Call `data.prepare(cache)`, or, if the data set has it, `data.prepare_some(cache, examples, seconds)`.

    Args:
      data: the data set.
      cache: see `Data.prepare`.
      examples: training examples after which it may stop; 0 for all.
      seconds: it is to refuse work that takes longer; 0 for any.

    Raises:
      UserError: see `Data.prepare`.
    """
    some = getattr(data, "prepare_some", None)
    some(cache, examples, seconds) if some else data.prepare(cache)


def grows(data: Data) -> bool:
    """Return whether training examples are made while training runs, so that it has no epochs."""
    return getattr(data, "grows", False)


def ahead(data: Data, cache: Path, examples: int) -> contextlib.AbstractContextManager[Callable[[], str]]:
    """Make the examples that `prepare_some` has left, in the background, until the context ends; nothing by default.

    Call it in one process, after `data.prepare_some(cache, ...)`. The context gives a function that returns why no
    further examples are made, "" while they are or if all exist.
    """
    own = getattr(data, "ahead", None)
    return own(cache, examples) if own else contextlib.nullcontext(str)


def fingerprint(data: Data, cache: Path) -> str:
    """Return a text that changes with the content of the examples, but not with their location; "" by default.

    A resumed run compares it with the checkpoint's to detect changed data. Call it after `data.prepare(cache)`.
    """
    return getattr(data, "fingerprint", lambda cache: "")(cache)


def augment(data: Data) -> Augment | None:
    """Return the augmentation `(example, rng) -> example` of training examples, or None.

    `rng` is a function of the seed and of the example's step and row, on any mesh. Held-out examples are not augmented
    and must have the shapes of augmented ones.
    """
    return getattr(data, "augment", None)


def decoder(data: Data, cache: Path) -> Decoder | None:
    """Return the function that decodes token ids to text, or None for data that are not text."""
    return getattr(data, "decoder", lambda cache: None)(cache)


def codec(data: Data, cache: Path) -> Codec | None:
    """Return what turns text to tokens and back, or None for data that are not text. The source may be missing."""
    return getattr(data, "codec", lambda cache: None)(cache)


def spec(data: Data) -> dict[str, jax.ShapeDtypeStruct] | None:
    """Return shapes and types of one augmented example without reading any, or None if the data set cannot tell."""
    return getattr(data, "spec", lambda: None)()


def beside(data: Data, training: Data, cache: Path) -> Data:
    """Return a further held-out set with what it must share with the training data, such as a tokenizer.

    Call it after `training.prepare(cache)`.
    """
    return getattr(data, "beside", lambda training, cache: data)(training, cache)
