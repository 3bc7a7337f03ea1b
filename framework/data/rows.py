"""Rows that are made once of a source's documents: a folder in the cache, named by what decides its content.

What data sets of text have in common: the knobs that say where documents come from, the stamp beside the rows, and how
malformed documents are counted and told.
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError
from ..workdir import read_json
from .documents import Documents, open_documents
from .records import Rejects
from .splits import SPLITS, Split


class DocumentKnobs(Protocol):
    """The knobs of a data set that is made of documents; `data.*` in a config."""

    @property
    def source(self) -> str:
        """What `open_documents` opens."""
        ...

    @property
    def data_dir(self) -> str:
        """Where tfds sets lie."""
        ...

    @property
    def text_key(self) -> str:
        """Feature of a tfds set."""
        ...

    @property
    def tsv_column(self) -> int:
        """Column of a .tsv file, from 1."""
        ...

    @property
    def train_split(self) -> str:
        """Split of a tfds set."""
        ...

    @property
    def heldout_split(self) -> str:
        """Split of a tfds set."""
        ...

    @property
    def max_documents(self) -> int:
        """Of a split; 0 takes all."""
        ...

    @property
    def max_malformed(self) -> int:
        """Documents of a split that may be skipped."""
        ...


def check_knobs(knobs: DocumentKnobs) -> None:
    """Raise ValueError where a knob cannot be meant."""
    if knobs.source.partition(":")[0] not in ("sample", "file", "tfds"):
        raise ValueError(
            f"data.source is {knobs.source!r}; write 'sample:enwiki', 'file:/path/*.txt' or 'tfds:lm1b:1.1.0'"
        )
    if knobs.max_documents < 0:
        raise ValueError(f"data.max_documents is {knobs.max_documents}; give a count, or 0 for all")
    if knobs.tsv_column < 1:
        raise ValueError(f"data.tsv_column is {knobs.tsv_column}; columns count from 1")
    if knobs.max_malformed < 0:
        raise ValueError(f"data.max_malformed is {knobs.max_malformed}; give a count, or 0 for none")


def documents_of(knobs: DocumentKnobs) -> Documents:
    """The source, open.

    Raises:
      UserError: it cannot be read.
    """
    return open_documents(
        knobs.source,
        data_dir=knobs.data_dir,
        text_key=knobs.text_key,
        tsv_column=knobs.tsv_column,
        train_split=knobs.train_split,
        heldout_split=knobs.heldout_split,
    )


def stream(knobs: DocumentKnobs, documents: Documents, split: Split, rejects: Rejects) -> Iterator[str]:
    """The usable documents of a split, `max_documents` at most."""
    return itertools.islice(rejects.sift(documents.stream(split)), knobs.max_documents or None)


def are_there(rows: Path, max_malformed: int) -> bool:
    """Whether rows are made already; what they lack for malformed documents is said again.

    Raises:
      UserError: they lack more than `max_malformed` in a split, or their stamp is damaged.
    """
    if not rows.exists():
        return False
    for split, rejects in read_stamp(rows, max_malformed)[1].items():
        rejects.refuse_excess()
        say_skipped(split, rejects)
    return True


def read_stamp(rows: Path, max_malformed: int) -> tuple[str, dict[Split, Rejects]]:
    """What is noted of rows: the hash of their content, and what each split has skipped.

    Raises:
      UserError: the stamp is damaged.
    """
    try:
        stamp = read_json(rows / "stamp.json") or {}
        skipped: dict[Split, Rejects] = {split: Rejects(max_malformed, **stamp[split]["malformed"]) for split in SPLITS}
        return stamp["content"], skipped
    except (KeyError, TypeError) as error:
        raise UserError(f"{rows}/stamp.json is damaged; remove {rows}, and it is made again") from error


def say_skipped(split: Split, rejects: Rejects) -> None:
    """One line on stderr, if any documents were skipped."""
    if rejects.count:
        print(f"{split} documents: {rejects}, skipped", file=sys.stderr, flush=True)


def digest(content: Any) -> str:
    """Hash of what JSON can hold, 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def tokenizer_digest(path: str) -> str:
    """Hash of the file that `data.tokenizer` names, "" for none.

    Raises:
      UserError: it cannot be read.
    """
    if not path:
        return ""
    try:
        return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"data.tokenizer {path} cannot be read ({error.strerror}); check the path") from error
