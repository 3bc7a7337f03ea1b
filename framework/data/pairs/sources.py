"""Sources of sentence pairs: the vendored sample, local TSV files, or a prepared tfds set."""

from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from ...base.errors import UserError
from ...dataset import Split
from .. import samples
from ..reading import tsv
from ..reading.files import ReadMeter
from ..reading.malformed import Malformed
from ..reading.sources import Source, TfdsSource, file_source

SAMPLES = {"nt": "web-lsg-nt.en-fr.tsv.xz"}
SAMPLE_SPLITS = {"validation": 0, "test": 1}  # (7 * book + chapter) % 20; other chapters are trained on


class Pair(NamedTuple):
    """A sentence and its translation; either may be empty."""

    source: str
    target: str


def open_pairs(
    source: str,
    *,
    data_dir: str,
    source_key: str,
    target_key: str,
    source_column: int,
    target_column: int,
    train_split: str,
    heldout_split: str,
) -> Source[Pair]:
    """Open the pairs of "sample:NAME", "file:GLOB" or "tfds:NAME/CONFIG:VERSION".

    Reads only enough to know that the source is readable; writes nothing.

    Raises:
      UserError: the source cannot be read; the message has the path and the fix.
    """
    kind, _, name = source.partition(":")
    if kind == "tfds":
        keys = {"source_key": source_key, "target_key": target_key}
        pairs = TfdsSource(name, data_dir, keys, Pair, train=train_split, heldout=heldout_split)
        pairs.fingerprint += f" {source_key} {target_key}"  # the set's own fingerprint does not tell them apart
        return pairs
    if kind == "file":
        columns = {"source": source_column, "target": target_column}
        return file_source(name, "*.tsv", lambda path, meter: _rows(path, meter, columns), columns)
    return _sample(name, heldout_split)


def _rows(path: epath.Path, meter: ReadMeter, columns: dict[str, int]) -> Iterator[Pair | Malformed]:
    for row in tsv.read(path, meter):
        if isinstance(row, Malformed):
            yield row
            continue
        for side, column in columns.items():
            if column > len(row):
                raise UserError(
                    f"data.{side}_column={column}: but {path} has {len(row)} columns, separated by tabs and counted "
                    "from 1"
                )
        yield Pair(*(row[column - 1] for column in columns.values()))


def _sample(name: str, heldout_split: str) -> Source[Pair]:
    """Open verses of the New Testament, English to French, split by chapter."""
    if name not in SAMPLES:
        raise UserError(f"data.source='sample:{name}': is not shipped; there is sample:{', sample:'.join(SAMPLES)}")
    if heldout_split not in SAMPLE_SPLITS:
        raise UserError(
            f"data.heldout_split={heldout_split!r}: sample:{name} holds out {' or '.join(map(repr, SAMPLE_SPLITS))}"
        )
    heldout = SAMPLE_SPLITS[heldout_split]

    def records(split: Split) -> Iterator[Pair]:
        for line in samples.read(SAMPLES[name]).decode().removesuffix("\n").split("\n"):
            place, source, target = line.split("\t")
            book, chapter, _ = map(int, place.split("."))
            group = (7 * book + chapter) % 20
            if group == heldout if split == "heldout" else group not in SAMPLE_SPLITS.values():
                yield Pair(source, target)

    return Source(f"{samples.sha256(SAMPLES[name])} {heldout_split}", records)
