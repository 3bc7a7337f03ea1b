"""The manifest of a state of Distributed Shampoo: the bucket and slot of each block of each parameter.

It is saved as JSON beside the arrays; checksums protect both. Reading checks that it fits the arrays.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..host.in_flight import InFlight
from ..linalg.symmetric import packed_shape
from ..options import Options
from ..plan.blocks import Bucket, Leaf, Plan
from ..plan.patterns import state_key
from ..plan.views import View
from ..preconditioners import PRECONDITIONERS
from ..preconditioners.base import PreconditionerState

MOMENTUM, SECOND_MOMENT, AGE = "moments/momentum", "moments/second_moment", "moments/age"
# Fields of a bucket's state with one number per element of the parameters -> name in reports.
ELEMENTWISE = {MOMENTUM: "momentum", SECOND_MOMENT: "second moment"}

Shapes = Mapping[str, tuple[int, ...]]


def describe(plan: Plan, options: Options) -> dict[str, Any]:
    """Return the manifest of a state as JSON, for `SavedBlocks.read`."""
    return {
        "momentum": options.momentum,
        "graft": options.graft,
        "phases": 0 if options.refresh == "host" else max((bucket.phases for bucket in plan.buckets), default=0),
        "buckets": {bucket.name: describe_bucket(bucket) for bucket in plan.buckets},
        "diagonal": {
            leaf.path: {"shape": list(leaf.shape), "beta2": leaf.beta2}
            | ({"by_row": True} if leaf.by_row else {"method": options.diagonal})
            for leaf in plan.diagonal.values()
        },
    }


def describe_bucket(bucket: Bucket) -> dict[str, Any]:
    """Return the manifest of a bucket."""
    return {
        "shape": list(bucket.shape),
        "sides": list(bucket.sides),
        "preconditioner": bucket.preconditioner.name,
        "p": bucket.p,
        "beta2": bucket.beta2,
        "ridge": bucket.ridge,
        "cut": bucket.cut,
        "first": bucket.first,
        "phases": bucket.phases,
        "parameters": [
            {
                "path": leaf.path,
                "shape": list(leaf.view.shape),
                "stack": list(leaf.view.stack),
                "sides": [list(side) for side in leaf.view.sides],
                "pieces": list(leaf.tiling.pieces),
            }
            for leaf in bucket.leaves
        ],
        "slots": bucket.slots.reshape(-1).tolist(),
    }


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of one parameter in a bucket.

    Attributes:
      bucket: name of the bucket.
      view: view of the parameter.
      pieces: number of blocks along each side.
      shape: shape of a block.
      slots: [blocks] int, slots of the blocks in row-major order of stack x pieces.
    """

    bucket: str
    view: View
    pieces: tuple[int, ...]
    shape: tuple[int, ...]
    slots: np.ndarray

    @classmethod
    def of(cls, bucket: Bucket, leaf: Leaf) -> "Blocks":
        """Return the blocks of a parameter in a bucket of a plan."""
        first = sum(other.tiling.blocks for other in bucket.leaves[: bucket.leaves.index(leaf)])
        slots = bucket.slot_of_block[first : first + leaf.tiling.blocks]
        return cls(bucket.name, leaf.view, leaf.tiling.pieces, bucket.shape, slots)

    @property
    def geometry(self) -> Any:
        """Return a key that is equal for equally cut parameters."""
        return self.view, self.pieces, self.shape

    def joined(self, stack: np.ndarray) -> np.ndarray:
        """Return the parameter-shaped array from blocks [slots, *shape] of the bucket."""
        view, sides, axes = self.view, len(self.shape), self._axes
        blocks = stack[self.slots].reshape(view.stacked, *self.pieces, *self.shape)
        order = [0, *(1 + axis + half * sides for axis in range(sides) for half in (0, 1))]
        whole = blocks.transpose(order).reshape(view.stacked, *self._padded)
        whole = whole[(slice(None), *map(slice, view.lengths))]
        return whole.reshape([view.shape[axis] for axis in axes]).transpose(np.argsort(axes))

    def cut_into(self, stack: np.ndarray, parameter: np.ndarray) -> None:
        """Write the blocks of a parameter-shaped array to their slots of `stack`; the inverse of `joined`."""
        view, sides = self.view, len(self.shape)
        whole = parameter.transpose(self._axes).reshape(view.stacked, *view.lengths)
        widths = [(0, total - length) for total, length in zip(self._padded, view.lengths, strict=True)]
        whole = np.pad(whole, [(0, 0), *widths])
        split = [part for pair in zip(self.pieces, self.shape, strict=True) for part in pair]
        order = [0, *range(1, 2 * sides, 2), *range(2, 2 * sides + 1, 2)]
        stack[self.slots] = whole.reshape(view.stacked, *split).transpose(order).reshape(-1, *self.shape)

    @property
    def _axes(self) -> list[int]:
        return [*self.view.stack, *(axis for side in self.view.sides for axis in side)]

    @property
    def _padded(self) -> list[int]:
        return [count * length for count, length in zip(self.pieces, self.shape, strict=True)]


@dataclasses.dataclass(frozen=True)
class SavedBucket:
    """A bucket of a manifest.

    Attributes:
      name: name of the bucket.
      entry: result of `describe_bucket`.
      shape: shape of a block.
      slots: [slots] int64, block in each slot; the number of blocks for an empty slot.
      blocks: path of a parameter -> its blocks.
    """

    name: str
    entry: Mapping[str, Any]
    shape: tuple[int, ...]
    slots: np.ndarray
    blocks: dict[str, Blocks]


@dataclasses.dataclass(frozen=True)
class SavedBlocks:
    """A checked manifest. Paths of parameters are present paths.

    Attributes:
      momentum, graft: the options of these names.
      buckets: name -> bucket.
      blocks: path of a preconditioned parameter -> its blocks.
      diagonal: path of a parameter under diagonal treatment -> (what names of its arrays begin with, beta2, name of
        its method, "" for row-wise treatment).
    """

    momentum: str
    graft: str
    buckets: dict[str, SavedBucket]
    blocks: dict[str, Blocks]
    diagonal: dict[str, tuple[str, float, str]]

    @classmethod
    def read(cls, manifest: Any, shapes: Shapes, renamed: Callable[[str], str] = lambda path: path) -> "SavedBlocks":
        """Read and check a manifest written by `describe`.

        Args:
          manifest: any JSON value.
          shapes: name -> shape of the saved arrays; names are paths in the state joined by slashes.
          renamed: maps a saved parameter's path to its present path.

        Raises:
          ValueError: the manifest is invalid, or does not match the arrays.
        """
        try:
            return _read(manifest, shapes, renamed)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
            what = str(error) if type(error) is ValueError else f"{type(error).__name__} {error}"
            raise ValueError(f"invalid manifest of Distributed Shampoo: {what}") from error


def _read(manifest: Any, shapes: Shapes, renamed: Callable[[str], str]) -> SavedBlocks:
    buckets = {name: _bucket(name, entry) for name, entry in manifest["buckets"].items()}
    known = set()
    for bucket in buckets.values():
        known |= _check_arrays(bucket, shapes)
    diagonal = {}
    for path, kept in manifest["diagonal"].items():
        shape, by_row, prefix = tuple(kept["shape"]), bool(kept.get("by_row")), f"diagonal/{state_key(path)}/"
        diagonal[path] = prefix, float(kept["beta2"]), "" if by_row else kept["method"]
        for field in (SECOND_MOMENT,) if by_row else (MOMENTUM, SECOND_MOMENT):
            name, wanted = f"{prefix}{field.partition('/')[2]}", shape[:-1] if by_row else shape
            if shapes.get(name, wanted) != wanted:
                raise ValueError(f"{name} has the shape {list(shapes[name])}; it should have {list(wanted)}")
            known.add(name)
        known.add(f"{prefix}age")
    for name in ("count", "skipped"):
        if shapes.get(name) != ():
            raise ValueError(f"{name} must be a scalar array")
    for name in shapes:
        if name.partition("/")[0] in ("buckets", "diagonal") and name not in known:
            raise ValueError(f"{name} is an array that it does not describe")
    paths = [*(path for bucket in buckets.values() for path in bucket.blocks), *diagonal]
    if len({renamed(path) for path in paths}) != len(paths):
        raise ValueError("a parameter occurs twice")
    buckets = {
        name: dataclasses.replace(bucket, blocks={renamed(path): blocks for path, blocks in bucket.blocks.items()})
        for name, bucket in buckets.items()
    }
    return SavedBlocks(
        momentum=manifest["momentum"],
        graft=manifest["graft"],
        buckets=buckets,
        blocks={path: blocks for bucket in buckets.values() for path, blocks in bucket.blocks.items()},
        diagonal={renamed(path): kept for path, kept in diagonal.items()},
    )


def _bucket(name: str, entry: Mapping[str, Any]) -> SavedBucket:
    shape, slots = tuple(entry["shape"]), np.array(entry["slots"], np.int64)
    if entry["preconditioner"] not in PRECONDITIONERS:
        raise ValueError(f"bucket {name} has the unknown preconditioner {entry['preconditioner']!r:.50}")
    slot_of_block = np.argsort(slots, kind="stable")
    blocks: dict[str, Blocks] = {}
    first = 0
    for part in entry["parameters"]:
        path, pieces = part["path"], tuple(part["pieces"])
        view = View(tuple(part["shape"]), tuple(part["stack"]), tuple(map(tuple, part["sides"])))
        if sorted(view.axes) != list(range(len(view.shape))):
            raise ValueError(f"{path} has {len(view.shape)} axes, its sides and stack name {list(view.axes)}")
        if any(whole > count * length for whole, count, length in zip(view.lengths, pieces, shape, strict=True)):
            raise ValueError(f"{path} has sides of {list(view.lengths)}, its blocks do not cover them")
        count = view.stacked * math.prod(pieces)
        if first + count > len(slots):
            raise ValueError(f"{path} has {count} blocks, {len(slots) - first} slots are left")
        blocks[path] = Blocks(name, view, pieces, shape, slot_of_block[first : first + count])
        first += count
    if not np.array_equal(slots[slot_of_block], np.minimum(np.arange(len(slots)), first)):
        raise ValueError(f"the slots of bucket {name} do not hold each of its {first} blocks once")
    return SavedBucket(name, entry, shape, slots, blocks)


def _check_arrays(bucket: SavedBucket, shapes: Shapes) -> set[str]:
    """Return the names of a bucket's arrays; raise ValueError if one is missing or has the wrong shape."""
    lengths = [bucket.shape[side] for side in bucket.entry["sides"]]
    statistics = {f"statistics/{number}": packed_shape(r) for number, r in enumerate(lengths)}

    def per_slot(kind: type, prefix: str, *stacks: str) -> dict[str, tuple[int, ...]]:
        fields: Sequence[str] = kind._fields  # type: ignore  (of a NamedTuple)
        return {f"{prefix}/{field}": () for field in fields if field not in stacks}

    needed = (
        {"block": (), "graft_ratio": (), AGE: ()}
        | per_slot(PreconditionerState, "roots", "statistics", "roots", "second_moment")
        | {f"roots/{name}": shape for name, shape in statistics.items()}
        | {f"roots/roots/{number}": (r, r) for number, r in enumerate(lengths)}
    )
    prefix = f"buckets/{bucket.name}/"
    if any(name.startswith(f"{prefix}in_flight/") for name in shapes):
        needed |= per_slot(InFlight, "in_flight", "statistics")
        needed |= {f"in_flight/{name}": shape for name, shape in statistics.items()}
    known = dict.fromkeys([*ELEMENTWISE, "roots/second_moment"], bucket.shape) | needed
    for field, shape in known.items():
        there = shapes.get(f"{prefix}{field}")
        if there != (len(bucket.slots), *shape) and (there is not None or field in needed):
            found = "is missing" if there is None else f"has the shape {list(there)}"
            raise ValueError(f"{prefix}{field} {found}; it should have {[len(bucket.slots), *shape]}")
    return {f"{prefix}{field}" for field in known}
