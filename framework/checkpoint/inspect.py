"""Describe checkpoints for people. Nothing is put on a device, and nothing in a checkpoint is executed."""

import dataclasses
import datetime
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ...optimizers.checkpoint.manifest import SavedBlocks
from ..base import paths
from ..base import workdir as layout
from ..base.errors import UserError
from ..base.paths import Path
from . import shelf, store, verify
from .record import Evaluation, Record
from .store import OPTIMIZER, Array

_NUMBERS = ("step", "size", "arrays", "bytes", "count", "blocks")  # columns that are aligned to the right
_BUCKET = re.compile(rf"({OPTIMIZER}(?:.+/)?buckets)/[^/]+/(.+?)(/\d+)?")  # side and bucket of an array
_BLOCKS = re.compile(rf"({OPTIMIZER}(?:.+/)?)buckets/[^/]+/block$")  # where Distributed Shampoo's state begins


@dataclasses.dataclass(frozen=True)
class Contents:
    """The description of a checkpoint.

    Attributes:
      path, record, manifest, arrays: as of `store`.
      blocks: beginning of the names of an optimizer's arrays -> its blocks; empty for one without blocks.
    """

    path: Path
    record: Record
    manifest: dict[str, Any]
    arrays: dict[str, Array]
    blocks: dict[str, SavedBlocks]


def read(path: Path) -> Contents:
    """Read what a checkpoint says of itself, and compare the manifest with the arrays.

    Raises:
      UserError: a part cannot be read or contradicts another.
    """
    record, manifest, arrays = store.record(path), store.manifest(path), store.arrays(path)
    try:
        # Blocks are detected by array names: the optimizer's class may not be importable, and is not executed.
        found = [name[: match.end(1)] for name in arrays if (match := _BLOCKS.match(name))]
        blocks = {}
        for prefix in dict.fromkeys(found):
            shapes = {name.removeprefix(prefix): x.shape for name, x in arrays.items() if name.startswith(prefix)}
            described = manifest["state"][prefix.removeprefix(OPTIMIZER).removesuffix("/")]
            blocks[prefix] = SavedBlocks.read(described, shapes)
        contents = Contents(path, record, manifest, arrays, blocks)
        as_text(contents, arrays=False)  # everything that it shows is there
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"the manifest of checkpoint {path} is damaged ({error}); use another one") from error
    return contents


def faults(path: Path) -> list[str]:
    """Return all that is wrong with a checkpoint, one text each: its files or else their content."""
    if found := store.faults(path):
        return found
    try:
        read(path)
    except UserError as error:
        return [str(error)]
    return []


def listing(workdir: Path) -> str:
    """Return the checkpoints of a workdir as a table.

    Raises:
      UserError: it has none, or its config cannot be read.
    """
    found, ranking = store.in_workdir(workdir), store.ranking(workdir)
    ranks = {path: rank for path, rank in store.ranks(workdir, ranking).items() if rank is not None}
    best = min(ranks.values(), default=None)
    rows = [("step", "saved", "size", f"held-out {ranking.metric}", "")]
    for path in found:
        notes = ["newest"] if path == found[-1] else []
        notes += ["best"] if path in ranks and ranks[path] == best else []
        notes += [] if verify.read(path).complete else ["not all checksums"]
        value = ranking.value(ranks[path]) if path in ranks else None
        rows.append((path.name, *_saved(path), _number(value), ", ".join(notes)))
    rows += [(f"{layout.DAMAGED}/{path.name}", *_saved(path), "-", "") for path in shelf.damaged(workdir)]
    return aligned(rows)


def as_text(contents: Contents, *, arrays: bool) -> str:
    """Return a description of a checkpoint: its run, bytes, parameters and blocks, and with `arrays` every array."""
    record, manifest, blocks = contents.record, contents.manifest, contents.blocks
    saved, size = _saved(contents.path)
    mesh = ", ".join(f"{axis} {length}" for axis, length in manifest["mesh"].items())
    head = [
        f"checkpoint {contents.path}",
        f"saved {saved}, {size} on disk",
        f"step {record.step:,}, {record.tokens:,} tokens, {record.seconds:,.1f} s of training, "
        f"{record.skipped:,} steps skipped",
        f"last evaluation: {_evaluation(record.last)}",
        f"best evaluation: {_evaluation(record.best)}",
        f"mesh: {mesh} ({math.prod(manifest['mesh'].values())} devices, processes: {manifest['processes']})",
        f"optimizer: {manifest['optimizer']}",
    ]
    sizes: dict[str, list[int]] = {}
    for name, array in contents.arrays.items():
        sizes.setdefault(_part(name), []).append(array.bytes)
    tables = [
        [
            ("content", "arrays", "bytes"),
            *((part, f"{len(numbers):,}", f"{sum(numbers):,}") for part, numbers in sizes.items()),
            ("total", f"{len(contents.arrays):,}", f"{sum(x.bytes for x in contents.arrays.values()):,}"),
        ],
        [
            ("parameter", "shape", "dtype", "treatment", "count"),
            *(
                (path, _shape(x["shape"]), x["dtype"], x["treatment"] or "-", f"{math.prod(x['shape']):,}")
                for path, x in manifest["parameters"].items()
            ),
        ],
        [
            ("bucket", "block", "blocks", "slots", "parameters"),
            *(row for one in blocks.values() for row in _buckets(one)),
        ],
        [
            ("array", "shape", "dtype", "bytes"),
            *((name, _shape(x.shape), x.dtype.name, f"{x.bytes:,}") for name, x in contents.arrays.items() if arrays),
        ],
    ]
    return "\n\n".join(["\n".join(head), *(aligned(table) for table in tables if len(table) > 1)])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as columns; numbers are aligned to the right."""
    right = [heading in _NUMBERS for heading in rows[0]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, right, strict=True)
        lines.append("  ".join(x.rjust(width) if to_right else x.ljust(width) for x, width, to_right in cells).rstrip())
    return "\n".join(lines)


def _part(name: str) -> str:
    """Return the part of the train state that an array belongs to; arrays of all buckets and sides are one part."""
    if match := _BUCKET.fullmatch(name):
        return f"{match[1]}/*/{match[2]}"
    return name.partition("/")[0]


def _buckets(blocks: SavedBlocks) -> Iterator[tuple[str, ...]]:
    for bucket in blocks.buckets.values():
        held = {path: len(blocks.slots) for path, blocks in bucket.blocks.items()}
        names = ", ".join(f"{path} x{count}" for path, count in held.items())
        yield bucket.name, _shape(bucket.shape), f"{sum(held.values()):,}", f"{len(bucket.slots):,}", names


def _evaluation(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "none"
    return f"after step {evaluation.step:,}: " + ", ".join(f"{x} {_number(y)}" for x, y in evaluation.values.items())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _saved(path: Path) -> tuple[str, str]:
    """Return when a checkpoint was committed and its size, "-" if a run has deleted it meanwhile."""
    try:
        seconds, size = paths.modified(path / "_CHECKPOINT_METADATA"), verify.size(path)
    except paths.errors():
        return "-", "-"
    return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "seconds"), f"{size / 1e6:,.1f} MB"
