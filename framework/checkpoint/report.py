"""What a person reads about checkpoints: a line for each of a workdir, and the whole content of one."""

import dataclasses
import datetime
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...optimizers.checkpoint.manifest import SavedBucket
from ..base import workdir as layout
from ..base.errors import UserError
from . import integrity, retention, store
from .contents import AVERAGING, MODEL, OPTIMIZER, PARAMS, Contents
from .record import Evaluation
from .store import Array

_MOMENTS, _ITERATE, _OTHER = "momenta and second moments", "iterate of the average", "other"
# Part of an array's path in the optimizer's state -> what it holds.
_OF_BUCKETS = {
    "roots/statistics": "statistics",
    "roots/roots": "roots",
    "moments": _MOMENTS,
    "gathered": "gathered gradients",
    "in_flight": "in flight",
}
_KINDS = ("parameters", *_OF_BUCKETS.values(), "model state", _ITERATE, _OTHER)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A checkpoint of a workdir.

    Attributes:
      path: the checkpoint.
      saved: when, to the second.
      size: its bytes, None where they cannot be counted.
      sealed: whether it has its checksums, without which it counts as unfinished.
      score: the held-out metric measured at its step, if it was.
      fault: what is wrong with it, as far as was looked; "" if nothing.
    """

    path: Path
    saved: str
    size: int | None
    sealed: bool
    score: float | None
    fault: str


def listing(workdir: Path, *, verify: bool) -> tuple[str, bool]:
    """The checkpoints of a workdir as a table, and whether no finished one was found damaged.

    Args:
      workdir: theirs.
      verify: whether to read every file and compare it with its checksum.

    Raises:
      UserError: there is nothing to list.
    """
    directory = workdir / layout.CHECKPOINTS
    others = sorted((workdir / layout.DAMAGED).glob("*"))
    if directory.is_dir():
        others += sorted(path for path in directory.iterdir() if not path.name.isdecimal())
    found = store.numbered(workdir)
    if not found and not others:
        raise UserError(f"{workdir} holds no checkpoint; give the --workdir of a training run")
    metric = retention.best_metric(workdir)
    entries = [_entry(path, metric, verify=verify) for path in found]
    whole = [entry for entry in entries if entry.sealed and not entry.fault]
    newest = whole[-1] if whole else None
    scores = [entry.score for entry in whole if entry.score is not None]
    rows = [("step", "saved", "size", f"held-out {metric}", "checksums", "")]
    for entry in entries:
        notes = ["newest"] if entry is newest else []
        notes += ["best"] if entry in whole and scores and entry.score == min(scores) else []
        notes += [entry.fault] if entry.fault else []
        score = "-" if entry.score is None else f"{entry.score:.4f}"
        seal = ("right" if verify and not entry.fault else "there") if entry.sealed else "none"
        size = "-" if entry.size is None else readable(entry.size)
        rows.append((entry.path.name, entry.saved, size, score, seal, ", ".join(notes)))
    for path in others:
        why = "unfinished" if path.parent == directory else "set aside: damaged or unfinished"
        size = _size(path)
        told = "-" if size is None else readable(size)
        rows.append((str(path.relative_to(workdir)), _saved(path), told, "-", "-", why))
    return aligned(rows), not any(entry.sealed and entry.fault for entry in entries)


def _entry(path: Path, metric: str, *, verify: bool) -> Entry:
    sealed, score, fault = integrity.is_sealed(path), None, "unfinished: its save did not come to an end"
    if sealed:
        faults = integrity.faults(path) if verify else []
        fault = f"damaged: {faults[0]}" if faults else ""
        try:
            score = store.record(path).score(metric)
        except UserError as error:
            fault = fault or str(error)
    return Entry(path, _saved(path), _size(path), sealed, score, fault)


def as_json(contents: Contents) -> dict[str, Any]:
    """All that `as_text` shows, and every array, as JSON."""
    arrays = {
        name: {"shape": list(x.shape), "dtype": x.dtype.name, "bytes": x.bytes, "kind": kind(name, contents)}
        for name, x in contents.arrays.items()
    }
    return _finite(
        {
            "checkpoint": str(contents.path),
            "saved": _saved(contents.path),
            "bytes_on_disk": _size(contents.path),
            "sealed": integrity.is_sealed(contents.path),
            "record": contents.record.to_json(),
            **{key: value for key, value in contents.manifest.to_json().items() if key != "state"},
            "sizes": {name: {"arrays": len(found), "bytes": size} for name, (found, size) in _sizes(contents).items()},
            "buckets": {bucket.name: _bucket_json(bucket, contents) for bucket in _buckets(contents)},
            "arrays": arrays,
        }
    )


def as_text(contents: Contents, *, arrays: bool) -> str:
    """What a checkpoint holds, for people; with `arrays` every array of it."""
    record, manifest, size = contents.record, contents.manifest, _size(contents.path)
    mesh = ", ".join(f"{axis} {length}" for axis, length in manifest.mesh.items())
    sealed = "sealed" if integrity.is_sealed(contents.path) else "without checksums: it counts as unfinished"
    lines = [
        f"checkpoint {contents.path}",
        f"saved {_saved(contents.path)}, {'-' if size is None else readable(size)} on disk, {sealed}",
        f"step {record.step:,}, {record.tokens:,} tokens, {record.seconds:,.1f} s of training, "
        f"{record.skipped:,} steps skipped",
        f"last evaluation: {_evaluation(record.last)}",
        f"best evaluation: {_evaluation(record.best)}",
        f"mesh: {mesh} ({contents.devices} devices, processes: {manifest.processes})",
        f"optimizer: {manifest.optimizer}",
    ]
    sizes = _sizes(contents)
    rows = [("content", "arrays", "bytes")]
    rows += [(name, f"{len(found):,}", f"{size:,}") for name, (found, size) in sizes.items()]
    rows.append(("total", f"{len(contents.arrays):,}", f"{sum(size for _, size in sizes.values()):,}"))
    tables = [rows, [("parameter", "shape", "dtype", "treatment", "count")]]
    for path, parameter in manifest.parameters.items():
        shape, count = _shape(parameter.shape), f"{math.prod(parameter.shape):,}"
        tables[-1].append((path, shape, parameter.dtype, parameter.treatment or "-", count))
    if buckets := _buckets(contents):
        tables.append([("bucket", "block", "blocks", "sides", "p", "slots", "empty", "parameters")])
        tables[-1] += [_bucket_row(bucket, contents) for bucket in buckets]
    if arrays:
        tables.append([("array", "shape", "dtype", "bytes", "kind")])
        for name, x in contents.arrays.items():
            tables[-1].append((name, _shape(x.shape), x.dtype.name, f"{x.bytes:,}", kind(name, contents)))
    return "\n\n".join(["\n".join(lines), *map(aligned, tables)])


def kind(name: str, contents: Contents) -> str:
    """What an array holds, one word for each of the sizes that are told."""
    if name.startswith(PARAMS):
        return "parameters"
    if name.startswith(MODEL):
        return "model state"
    if name.startswith(AVERAGING):
        return _ITERATE
    own = name.removeprefix(OPTIMIZER)
    if contents.blocks is None:
        # Of any optimizer's state, what mirrors a parameter by path.
        ends = ["/".join(own.split("/")[start:]) for start in range(1, own.count("/") + 1)]
        return _MOMENTS if own != name and any(end in contents.manifest.parameters for end in ends) else _OTHER
    if own.startswith("diagonal/"):
        return _MOMENTS
    field = "/".join(own.split("/")[2:])
    found = [told for part, told in _OF_BUCKETS.items() if field == part or field.startswith(f"{part}/")]
    return found[0] if own.startswith("buckets/") and found else _OTHER


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns; those of numbers, by their headings, to the right."""
    right = [heading in ("step", "size", "arrays", "bytes", "count", "blocks", "empty") for heading in rows[0]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def readable(size: int) -> str:
    """A number of bytes as in `1.3 GB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def _sizes(contents: Contents) -> dict[str, tuple[list[Array], int]]:
    """Kind -> (its arrays, their bytes), kinds without any left out."""
    found: dict[str, list[Array]] = {name: [] for name in _KINDS}
    for name, array in contents.arrays.items():
        found[kind(name, contents)].append(array)
    return {name: (arrays, sum(array.bytes for array in arrays)) for name, arrays in found.items() if arrays}


def _buckets(contents: Contents) -> list[SavedBucket]:
    return list(contents.blocks.buckets.values()) if contents.blocks else []


def _bucket_json(bucket: SavedBucket, contents: Contents) -> dict[str, Any]:
    return {
        "block": list(bucket.shape),
        "blocks": bucket.count,
        "sides": list(bucket.sides),
        **{field: bucket.entry[field] for field in ("p", "beta2", "ridge", "cut")},
        "owners": contents.devices,
        "slots_per_owner": len(bucket.slots) // contents.devices,
        "parameters": {path: len(blocks.slots) for path, blocks in bucket.blocks.items()},
    }


def _bucket_row(bucket: SavedBucket, contents: Contents) -> tuple[str, ...]:
    entry = _bucket_json(bucket, contents)
    return (
        bucket.name,
        _shape(bucket.shape),
        f"{bucket.count:,}",
        ",".join(map(str, bucket.sides)) or "-",
        str(entry["p"]),
        f"{entry['owners']} owners x {entry['slots_per_owner']}",
        f"{len(bucket.slots) - bucket.count:,}",
        ", ".join(f"{path} x{count}" for path, count in entry["parameters"].items()),
    )


def _evaluation(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "none"
    values = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.values.items())
    return f"after step {evaluation.step:,}: {values}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _saved(path: Path) -> str:
    """When a directory was finished; a copy that does not keep times has its own."""
    seal = path / integrity.SUMS
    try:
        seconds = (seal if seal.is_file() else path).stat().st_mtime
    except OSError:  # a run at work deletes checkpoints while they are looked at
        return "-"
    return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


def _size(path: Path) -> int | None:
    try:
        return integrity.size(path)
    except OSError:
        return None


def _finite(value: Any) -> Any:
    """JSON has no number that is not finite: null takes its place."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
