"""What data sets of documents have in common: the knobs that say where documents come from."""

from typing import Protocol

from .documents import Documents, open_documents


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


def split_settings(knobs: DocumentKnobs) -> dict[str, object]:
    """Which documents are read: what the settings of rows say of it."""
    kind = knobs.source.partition(":")[0]
    if kind == "tfds":
        return {name: getattr(knobs, name) for name in ("text_key", "train_split", "heldout_split")}
    return {"tsv_column": knobs.tsv_column} if kind == "file" else {}
