"""Read what a checkpoint says of itself, check its parts against each other, and show it to people.

Nothing is put on a device, and nothing in a checkpoint is executed.
"""

import dataclasses
import datetime
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...optimizers.checkpoint.manifest import SavedBlocks
from ..base import workdir as layout
from ..base.errors import UserError
from . import store, verify
from .manifest import Manifest
from .record import Record
from .store import AVERAGING, MODEL, OPTIMIZER, PARAMS, Array

_MOMENTS, _ITERATE, _OTHER = "momenta and second moments", "iterate of the average", "other"
# Part of an array's path in the optimizer's state -> kind of content.
_OF_BUCKETS = {
    "roots/statistics": "statistics",
    "roots/roots": "roots",
    "moments": _MOMENTS,
    "gathered": "gathered gradients",
    "in_flight": "in flight",
}
_KINDS = ("parameters", *_OF_BUCKETS.values(), "model state", _ITERATE, _OTHER)
_NUMBERS = ("step", "size", "arrays", "bytes", "count", "blocks", "empty")  # columns that are aligned to the right


@dataclasses.dataclass(frozen=True)
class Contents:
    """The description of a checkpoint.

    Attributes:
      path: the checkpoint.
      record: what the host knew.
      manifest: the description of the arrays.
      arrays: shape and dtype of each, by its path in the train state.
      blocks: where the optimizer's blocks are stored; None for an optimizer without blocks.
    """

    path: Path
    record: Record
    manifest: Manifest
    arrays: dict[str, Array]
    blocks: SavedBlocks | None

    @functools.cached_property
    def devices(self) -> int:
        """Number of devices of the run that saved it."""
        return math.prod(self.manifest.mesh.values())


def read(path: Path) -> Contents:
    """Read what a checkpoint says of itself.

    Raises:
      UserError: a part cannot be read or contradicts another.
    """
    contents = parse(path)
    if found := contradictions(contents):
        raise UserError(f"checkpoint {path} contradicts itself ({found[0]}); use another one")
    return contents


def parse(path: Path) -> Contents:
    """Read like `read`, without comparing the parts."""
    record, content, arrays = store.record(path), store.manifest(path), store.arrays(path)
    shapes = {name.removeprefix(OPTIMIZER): x.shape for name, x in arrays.items() if name.startswith(OPTIMIZER)}
    try:
        manifest = Manifest.from_json(content)
        # Blocks are detected by array names: the optimizer's class may not be importable, and is not executed.
        has_blocks = "buckets" in manifest.state or any(
            name.startswith("buckets/") and name.endswith("/block") for name in shapes
        )
        blocks = SavedBlocks.read(manifest.state, shapes) if has_blocks else None
    except ValueError as error:
        raise UserError(f"the manifest of checkpoint {path} is damaged ({error}); use another one") from error
    return Contents(path, record, manifest, arrays, blocks)


def faults(path: Path) -> list[str]:
    """Return all that is wrong with a checkpoint, one text each: its files or else their content."""
    found = store.faults(path)
    if found:
        return found
    try:
        contents = parse(path)
        return contradictions(contents) or _mismatches(contents)
    except UserError as error:
        return [str(error)]


def contradictions(contents: Contents) -> list[str]:
    """Return where record, manifest and shapes disagree, one text each; no array is read."""
    manifest, blocks = contents.manifest, contents.blocks
    there = {name.removeprefix(PARAMS): str(x) for name, x in contents.arrays.items() if name.startswith(PARAMS)}
    described = {path: f"{x.dtype}[{','.join(map(str, x.shape))}]" for path, x in manifest.parameters.items()}
    found = _differences(there, described, f"{PARAMS}{{}}", "the manifest has it as")
    if "step" not in contents.arrays:
        found.append("step is missing")
    numbered = contents.path.name.isdecimal() and contents.path.absolute().parent.name == layout.CHECKPOINTS
    if numbered and int(contents.path.name) != contents.record.step:
        found.append(f"the record is of step {contents.record.step}, the directory of step {contents.path.name}")
    if blocks is None:
        return found
    shapes = {path: blocks.buckets[name].blocks[path].view.shape for path, name in blocks.bucket_of.items()}
    shapes |= {path: tuple(entry["shape"]) for path, entry in blocks.diagonal.items()}
    parameters = {path: x.shape for path, x in manifest.parameters.items()}
    found += _differences(shapes, parameters, "the optimizer's state of {}", "the parameter has the shape")
    for name, bucket in blocks.buckets.items():
        if len(bucket.slots) % contents.devices:
            found.append(f"bucket {name} has {len(bucket.slots)} slots for {contents.devices} devices")
    return found


def _differences(there: Mapping[str, Any], wanted: Mapping[str, Any], name: str, rule: str) -> list[str]:
    """Return how two descriptions by path differ, one text each."""
    found = []
    for path in sorted(there.keys() | wanted.keys()):
        if path not in wanted:
            found.append(f"{name.format(path)} is not in the manifest")
        elif path not in there:
            found.append(f"{name.format(path)} is missing, {rule} {wanted[path]}")
        elif there[path] != wanted[path]:
            found.append(f"{name.format(path)} is {there[path]}, {rule} {wanted[path]}")
    return found


def _mismatches(contents: Contents) -> list[str]:
    """Return which small arrays differ from record and manifest: the step, and the block in each slot."""
    expected = {"step": np.array(contents.record.step)}
    if contents.blocks is not None:
        expected |= {
            f"{OPTIMIZER}buckets/{name}/block": bucket.slots for name, bucket in contents.blocks.buckets.items()
        }
    arrays = store.read(contents.path, dict.fromkeys(expected))
    return [
        f"{name} differs from the {'record' if name == 'step' else 'manifest'}"
        for name, values in expected.items()
        if not np.array_equal(arrays[name], values)
    ]


def listing(workdir: Path, *, verified: bool) -> tuple[str, bool]:
    """Return the checkpoints of a workdir as a table, and whether none was found damaged.

    Args:
      workdir: a workdir.
      verified: whether to compare every file with its checksum.

    Raises:
      UserError: there is nothing to list.
    """
    directory = workdir / layout.CHECKPOINTS
    others = sorted((workdir / layout.DAMAGED).glob("*"))
    if directory.is_dir():
        others += sorted(path for path in directory.iterdir() if not path.name.isdecimal())
    found = store.checkpoints(workdir)
    if not found and not others:
        raise UserError(f"{workdir} has no checkpoint; give the workdir of a training run")
    ranking = store.ranking(workdir)
    wrong, records = {}, {}
    for path in found:
        wrong[path] = store.faults(path)[:1] if verified else []
        try:
            records[path] = store.record(path)
        except UserError as error:
            wrong[path] = wrong[path] or [str(error)]
    intact = [path for path in found if not wrong[path]]
    ranks = {path: rank for path in intact if (rank := records[path].rank(ranking)) is not None}
    rows = [("step", "saved", "size", f"held-out {ranking.metric}", "checksums", "")]
    for path in found:
        notes = ["newest"] if path in intact[-1:] else []
        notes += ["best"] if path in ranks and ranks[path] == min(ranks.values()) else []
        notes += [f"damaged: {fault}" for fault in wrong[path]]
        score = records[path].score(ranking.metric) if path in records else None
        sums = "incomplete" if not verify.read(path).complete else "right" if verified and path in intact else "there"
        rows.append((path.name, _saved(path), _size(path), _number(score), sums, ", ".join(notes)))
    for path in others:
        why = "being saved or deleted" if path.parent == directory else "set aside: damaged"
        rows.append((str(path.relative_to(workdir)), _saved(path), _size(path), "-", "-", why))
    return aligned(rows), not any(wrong.values())


def describe(contents: Contents) -> dict[str, Any]:
    """Return everything that a checkpoint says of itself, ready for JSON."""
    kinds = {name: kind(name, contents) for name in contents.arrays}
    arrays = {
        name: {"shape": list(x.shape), "dtype": x.dtype.name, "bytes": x.bytes, "kind": kinds[name]}
        for name, x in contents.arrays.items()
    }
    sizes = {
        each: [array["bytes"] for array in arrays.values() if array["kind"] == each]
        for each in _KINDS
        if each in kinds.values()
    }
    buckets = contents.blocks.buckets.values() if contents.blocks else ()
    return _finite(
        {
            "checkpoint": str(contents.path),
            "saved": _saved(contents.path),
            "bytes_on_disk": verify.size(contents.path),
            "checksums": verify.read(contents.path).complete,
            "record": contents.record.to_json(),
            **{key: value for key, value in contents.manifest.to_json().items() if key != "state"},
            "sizes": {each: {"arrays": len(found), "bytes": sum(found)} for each, found in sizes.items()},
            "buckets": {
                bucket.name: {
                    "block": list(bucket.shape),
                    "blocks": bucket.count,
                    "sides": list(bucket.sides),
                    **{field: bucket.entry[field] for field in ("p", "beta2", "ridge", "cut")},
                    "owners": contents.devices,
                    "slots_per_owner": len(bucket.slots) // contents.devices,
                    "parameters": {path: len(blocks.slots) for path, blocks in bucket.blocks.items()},
                }
                for bucket in buckets
            },
            "arrays": arrays,
        }
    )


def as_text(told: Mapping[str, Any], *, arrays: bool) -> str:
    """Return a description as text for people, with every array if `arrays` is set."""
    record = told["record"]
    mesh = ", ".join(f"{axis} {length}" for axis, length in told["mesh"].items())
    sums = "" if told["checksums"] else ", checksums incomplete"
    lines = [
        f"checkpoint {told['checkpoint']}",
        f"saved {told['saved']}, {readable(told['bytes_on_disk'])} on disk{sums}",
        f"step {record['step']:,}, {record['tokens']:,} tokens, {record['seconds']:,.1f} s of training, "
        f"{record['skipped']:,} steps skipped",
        *(f"{which} evaluation: {_evaluation(record[which])}" for which in ("last", "best")),
        f"mesh: {mesh} ({math.prod(told['mesh'].values())} devices, processes: {told['processes']})",
        f"optimizer: {told['optimizer']}",
    ]
    sizes = [("content", "arrays", "bytes")]
    sizes += [(each, f"{x['arrays']:,}", f"{x['bytes']:,}") for each, x in told["sizes"].items()]
    total = sum(x["bytes"] for x in told["sizes"].values())
    sizes.append(("total", f"{len(told['arrays']):,}", f"{total:,}"))
    tables = [sizes, [("parameter", "shape", "dtype", "treatment", "count")]]
    for path, x in told["parameters"].items():
        tables[-1].append((path, _shape(x["shape"]), x["dtype"], x["treatment"] or "-", f"{math.prod(x['shape']):,}"))
    if told["buckets"]:
        tables.append([("bucket", "block", "blocks", "sides", "p", "slots", "empty", "parameters")])
        tables[-1] += [_bucket_row(name, bucket) for name, bucket in told["buckets"].items()]
    if arrays:
        tables.append([("array", "shape", "dtype", "bytes", "kind")])
        for name, x in told["arrays"].items():
            tables[-1].append((name, _shape(x["shape"]), x["dtype"], f"{x['bytes']:,}", x["kind"]))
    return "\n\n".join(["\n".join(lines), *map(aligned, tables)])


def kind(name: str, contents: Contents) -> str:
    """Return the kind of content of an array: one of the rows of the table of sizes."""
    for prefix, found in ((PARAMS, "parameters"), (MODEL, "model state"), (AVERAGING, _ITERATE)):
        if name.startswith(prefix):
            return found
    own = name.removeprefix(OPTIMIZER)
    if contents.blocks is None:
        # In the state of any optimizer, arrays that are named like a parameter are its moments.
        ends = ["/".join(own.split("/")[start:]) for start in range(1, own.count("/") + 1)]
        return _MOMENTS if own != name and any(end in contents.manifest.parameters for end in ends) else _OTHER
    if own.startswith("diagonal/"):
        return _MOMENTS
    field = "/".join(own.split("/")[2:])
    kinds = [each for part, each in _OF_BUCKETS.items() if field == part or field.startswith(f"{part}/")]
    return kinds[0] if own.startswith("buckets/") and kinds else _OTHER


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as columns; numbers are aligned to the right."""
    right = [heading in _NUMBERS for heading in rows[0]]
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
    """Return a number of bytes as in `1.3 GB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def _bucket_row(name: str, bucket: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        _shape(bucket["block"]),
        f"{bucket['blocks']:,}",
        ",".join(map(str, bucket["sides"])) or "-",
        str(bucket["p"]),
        f"{bucket['owners']} owners x {bucket['slots_per_owner']}",
        f"{bucket['owners'] * bucket['slots_per_owner'] - bucket['blocks']:,}",
        ", ".join(f"{path} x{count}" for path, count in bucket["parameters"].items()),
    )


def _evaluation(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "none"
    values = ", ".join(f"{name} {_number(value)}" for name, value in evaluation["values"].items())
    return f"after step {evaluation['step']:,}: {values}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _saved(path: Path) -> str:
    """Return when a checkpoint was committed; "-" if a run has deleted it meanwhile."""
    metadata = path / "_CHECKPOINT_METADATA"
    try:
        seconds = (metadata if metadata.is_file() else path).stat().st_mtime
    except OSError:
        return "-"
    return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


def _size(path: Path) -> str:
    try:
        return readable(verify.size(path))
    except OSError:  # a run deletes checkpoints while they are listed
        return "-"


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON cannot hold, by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
