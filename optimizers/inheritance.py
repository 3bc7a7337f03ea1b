"""What a state of Distributed Shampoo takes over from a saved one, of other devices, another model or other options.

A saved state comes with a manifest that tells which block of which parameter lies where. Blocks are known by the path
of their parameter and their coordinates in it, never by position: so statistics and roots find their blocks again on
any number of devices, and beside parameters that were added or removed. Momenta and second moments belong to single
elements and find these again even where blocks are of another size.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .blocks import Bucket, Leaf, Plan
from .options import ShampooOptions
from .patterns import state_key
from .refresh import NO_GRADIENT
from .views import View

Arrays = Mapping[str, np.ndarray]

MOMENTUM, SECOND_MOMENT, GATHERED = "moments/momentum", "moments/second_moment", "gathered"
# Fields of a bucket's state that hold one number for each element of the parameters, and what people call them.
_ELEMENTWISE = {MOMENTUM: "momentum", SECOND_MOMENT: "second moment", GATHERED: "gathered gradients"}
_STATISTICS, _ROOTS, _IN_FLIGHT = "statistics", "roots", "roots in flight"


class Kept(NamedTuple):
    """An array that is taken over as it was saved.

    Attributes:
      name: of the saved array.
    """

    name: str


class Made(NamedTuple):
    """An array that is made of saved ones.

    Attributes:
      names: of the saved arrays.
      make: from these, by name, the array.
    """

    names: tuple[str, ...]
    make: Callable[[Arrays], np.ndarray]


class Fresh(NamedTuple):
    """An array of which nothing was saved that could be used.

    Attributes:
      why: for people.
    """

    why: str


Source = Kept | Made | Fresh


def describe(plan: Plan, options: ShampooOptions) -> dict[str, Any]:
    """The manifest of a state: what `Inheritance` must know of it, as JSON."""
    return {
        "momentum": options.momentum,
        "graft": options.graft,
        "buckets": {bucket.name: _describe_bucket(bucket) for bucket in plan.buckets},
        "diagonal": {leaf.path: {"shape": list(leaf.shape), "beta2": leaf.beta2} for leaf in plan.diagonal.values()},
    }


def _describe_bucket(bucket: Bucket) -> dict[str, Any]:
    return {
        "shape": list(bucket.shape),
        "sides": list(bucket.sides),
        **{field: getattr(bucket.group, field) for field in ("p", "beta2", "ridge", "cut")},
        "first": bucket.first,
        "phases": bucket.phases,
        "parameters": [_describe_leaf(leaf) for leaf in bucket.leaves],
        "slots": bucket.slots.reshape(-1).tolist(),
    }


def _describe_leaf(leaf: Leaf) -> dict[str, Any]:
    view = leaf.view
    return {
        "path": leaf.path,
        "shape": list(view.shape),
        "stack": list(view.stack),
        "sides": [list(side) for side in view.sides],
        "pieces": list(leaf.tiling.pieces),
    }


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The blocks of one parameter in a bucket: how they are cut, and in which slots they lie."""

    view: View
    pieces: tuple[int, ...]
    shape: tuple[int, ...]
    slots: np.ndarray

    @property
    def geometry(self) -> Any:
        """Equal where blocks are the same parts of the same parameter."""
        return self.view, self.pieces, self.shape

    def joined(self, stack: np.ndarray) -> np.ndarray:
        """Blocks [slots, *shape] of the bucket -> the parameter."""
        view, sides = self.view, len(self.shape)
        blocks = stack[self.slots].reshape(view.stacked, *self.pieces, *self.shape)
        order = [0, *(1 + axis + half * sides for axis in range(sides) for half in (0, 1))]
        padded = [count * length for count, length in zip(self.pieces, self.shape, strict=True)]
        whole = blocks.transpose(order).reshape(view.stacked, *padded)
        whole = whole[(slice(None), *map(slice, view.lengths))]
        axes = self._axes
        return whole.reshape([view.shape[axis] for axis in axes]).transpose(np.argsort(axes))

    def cut_into(self, stack: np.ndarray, parameter: np.ndarray) -> None:
        """The inverse of `joined`: writes the parameter's blocks into their slots of `stack`."""
        view, sides = self.view, len(self.shape)
        whole = parameter.transpose(self._axes).reshape(view.stacked, *view.lengths)
        padded = [count * length for count, length in zip(self.pieces, self.shape, strict=True)]
        widths = [(0, total - length) for total, length in zip(padded, view.lengths, strict=True)]
        whole = np.pad(whole, [(0, 0), *widths])
        split = [part for pair in zip(self.pieces, self.shape, strict=True) for part in pair]
        order = [0, *range(1, 2 * sides, 2), *range(2, 2 * sides + 1, 2)]
        stack[self.slots] = whole.reshape(view.stacked, *split).transpose(order).reshape(-1, *self.shape)

    @property
    def _axes(self) -> list[int]:
        return [*self.view.stack, *(axis for side in self.view.sides for axis in side)]


@dataclasses.dataclass(frozen=True)
class _Saved:
    """A bucket of the manifest."""

    name: str
    entry: Mapping[str, Any]
    blocks: dict[str, _Blocks]


class Inheritance:
    """Where each array of a new state comes from.

    Args:
      plan: of the new state's parameters.
      options: of the new state.
      manifest: what `describe` gave for the saved state.
      shapes: name -> shape of the arrays that were saved; names are paths in the state, joined by slashes.
      renamed: gives a saved parameter's path its name of today.

    Raises:
      ValueError: the manifest is not one.
    """

    def __init__(
        self,
        plan: Plan,
        options: ShampooOptions,
        manifest: Any,
        shapes: Mapping[str, tuple[int, ...]],
        renamed: Callable[[str], str] = lambda path: path,
    ):
        self._plan, self._options, self._shapes = plan, options, shapes
        try:
            self._read(manifest, renamed)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
            raise ValueError(f"no manifest of Distributed Shampoo: {type(error).__name__} {error}") from error
        self._fates = {leaf.path: self._fate(bucket, leaf) for bucket in plan.buckets for leaf in bucket.leaves} | {
            leaf.path: self._elementwise_fate(leaf.path, leaf.shape, leaf.beta2) for leaf in plan.diagonal.values()
        }

    def _read(self, manifest: Any, renamed: Callable[[str], str]) -> None:
        self._momentum, self._graft = str(manifest["momentum"]), str(manifest["graft"])
        self._buckets: dict[str, _Saved] = {}
        self._bucket_of: dict[str, str] = {}
        self._numbering = []
        for name, given in manifest["buckets"].items():
            entry = _checked(given)
            slots = np.asarray(entry["slots"], np.int64)
            if self._shapes.get(f"buckets/{name}/block") != slots.shape:
                raise ValueError(f"bucket {name} has {slots.size} slots, its arrays another number")
            slot_of_block = np.argsort(slots, kind="stable")
            shape, blocks, first = tuple(entry["shape"]), {}, 0
            for part in entry["parameters"]:
                view = View(tuple(part["shape"]), tuple(part["stack"]), tuple(map(tuple, part["sides"])))
                if sorted([*view.stack, *(axis for side in view.sides for axis in side)]) != [*range(len(view.shape))]:
                    raise ValueError(f"{part['path']} has an axis too many or too few")
                pieces = tuple(part["pieces"])
                count = view.stacked * math.prod(pieces)
                if count < 1 or first + count > len(slots) or len(pieces) != len(shape):
                    raise ValueError(f"{part['path']} has {count} blocks, {len(slots) - first} slots are left")
                path = renamed(part["path"])
                blocks[path] = _Blocks(view, pieces, shape, slot_of_block[first : first + count])
                self._bucket_of[path] = name
                first += count
            if first < len(slots) and not np.all(slots[slot_of_block[first:]] == first):
                raise ValueError(f"bucket {name} has blocks of no parameter")
            self._buckets[name] = _Saved(name, entry, blocks)
            self._numbering.append((name, *_numbering(entry), *blocks))
        self._diagonal = {renamed(path): path for path in manifest["diagonal"]}
        self._diagonal_beta2 = {renamed(path): float(kept["beta2"]) for path, kept in manifest["diagonal"].items()}
        names = list(self._buckets)
        if len(self._bucket_of) != sum(len(self._buckets[name].blocks) for name in names):
            raise ValueError("a parameter is in it twice")

    def source(self, name: str, shape: tuple[int, ...]) -> Source:
        """Where the array `name` of the new state, of this shape, comes from."""
        kind, _, rest = name.partition("/")
        if kind == "buckets":
            bucket_name, _, field = rest.partition("/")
            return self._bucket_source(next(b for b in self._plan.buckets if b.name == bucket_name), field, shape)
        if kind == "diagonal":
            key, _, field = rest.partition("/")
            path = next(leaf.path for leaf in self._plan.diagonal.values() if state_key(leaf.path) == key)
            return self._diagonal_source(path, f"moments/{field}", shape)
        return Kept(name) if self._shapes.get(name) == shape else Fresh("there is none")

    def report(self) -> dict[str, dict[str, str]]:
        """Path of a parameter -> part of its state -> "" where it is taken over, or why it is not."""
        return self._fates

    def notes(self) -> list[str]:
        """What else a person should know."""
        flying = [name for name in self._shapes if "/in_flight/" in name]
        if flying and not (self._options.refresh == "host" and self._same_numbering):
            return ["roots that were under way on the host are dropped; their blocks are refreshed when they are due"]
        return []

    @property
    def _same_numbering(self) -> bool:
        """Whether every block is due on the same steps as it was."""
        mine = [
            (b.name, *_numbering(_describe_bucket(b)), *(leaf.path for leaf in b.leaves)) for b in self._plan.buckets
        ]
        return mine == self._numbering

    def _saved_blocks(self, path: str) -> _Blocks | None:
        name = self._bucket_of.get(path)
        return self._buckets[name].blocks[path] if name is not None else None

    def _fate(self, bucket: Bucket, leaf: Leaf) -> dict[str, str]:
        fate = self._elementwise_fate(leaf.path, leaf.view.shape, bucket.group.beta2)
        if not bucket.sides:
            return fate
        saved, mine = self._saved_blocks(leaf.path), _blocks(bucket, leaf)
        fate[_STATISTICS] = fate[_ROOTS] = ""
        if saved is None:
            fate[_STATISTICS] = fate[_ROOTS] = "there are none"
            return fate
        entry = self._buckets[self._bucket_of[leaf.path]].entry
        if saved.geometry != mine.geometry:
            there, here = ("x".join(map(str, blocks.shape)) for blocks in (saved, mine))
            fate[_STATISTICS] = f"blocks of {there} there, {here} here"
            if there == here:
                fate[_STATISTICS] = "blocks are cut in another way"
        elif list(entry["sides"]) != list(bucket.sides):
            fate[_STATISTICS] = f"of the sides {list(entry['sides'])} there, {list(bucket.sides)} here"
        elif (entry["beta2"] == 1) != (bucket.group.beta2 == 1):
            fate[_STATISTICS] = "a sum and an average are two things"
        fate[_ROOTS] = fate[_STATISTICS] or next(
            (
                f"{field} {entry[field]} there, {getattr(bucket.group, field)} here"
                for field in ("p", "ridge", "cut")
                if entry[field] != getattr(bucket.group, field)
            ),
            "",
        )
        return fate

    def _elementwise_fate(self, path: str, shape: tuple[int, ...], beta2: float) -> dict[str, str]:
        fate = {}
        kept = [MOMENTUM] if self._options.beta1 else []
        kept += [SECOND_MOMENT] if self._options.diagonal.has_second_moment else []
        for field in kept:
            found = self._elementwise(path, field)
            if found is None:
                fate[_ELEMENTWISE[field]] = "there is none"
            elif found[1] != shape:
                fate[_ELEMENTWISE[field]] = f"of shape {list(found[1])} there, {list(shape)} here"
            elif field == MOMENTUM and self._momentum != self._options.momentum:
                fate[_ELEMENTWISE[field]] = f"{self._momentum} there, {self._options.momentum} here"
            elif field == SECOND_MOMENT and self._graft != self._options.graft:
                fate[_ELEMENTWISE[field]] = f"graft {self._graft} there, {self._options.graft} here"
            elif field == SECOND_MOMENT and (self._beta2(path) == 1) != (beta2 == 1):
                fate[_ELEMENTWISE[field]] = "a sum and an average are two things"
            else:
                fate[_ELEMENTWISE[field]] = ""
        return fate

    def _beta2(self, path: str) -> float:
        name = self._bucket_of.get(path)
        return self._diagonal_beta2[path] if name is None else float(self._buckets[name].entry["beta2"])

    def _elementwise(self, path: str, field: str) -> tuple[str, tuple[int, ...]] | None:
        """(name of the saved array that holds a parameter's momentum or second moment, the parameter's shape)."""
        saved = self._saved_blocks(path)
        if saved is not None:
            name, shape = f"buckets/{self._bucket_of[path]}/{field}", saved.view.shape
            return (name, shape) if name in self._shapes else None
        if path in self._diagonal and field != GATHERED:
            name = f"diagonal/{state_key(self._diagonal[path])}/{field.partition('/')[2]}"
            return (name, self._shapes[name]) if name in self._shapes else None
        return None

    def _parameter(self, path: str, name: str, arrays: Arrays) -> np.ndarray:
        saved = self._saved_blocks(path)
        return arrays[name] if saved is None else saved.joined(arrays[name])

    def _diagonal_source(self, path: str, field: str, shape: tuple[int, ...]) -> Source:
        why, found = self._fates[path][_ELEMENTWISE[field]], self._elementwise(path, field)
        if why or found is None:
            return Fresh(why)
        name, _ = found
        if self._saved_blocks(path) is None:
            return Kept(name)
        return Made((name,), lambda arrays: self._parameter(path, name, arrays).reshape(shape))

    def _bucket_source(self, bucket: Bucket, field: str, shape: tuple[int, ...]) -> Source:
        name, slots = f"buckets/{bucket.name}/{field}", len(bucket.slots.reshape(-1))
        part = _part(field)
        fates = [self._fates[leaf.path].get(part, "") for leaf in bucket.leaves]
        saved = self._buckets.get(bucket.name)
        unchanged = saved is not None and _describe_bucket(bucket) == dict(saved.entry)
        same = unchanged and self._shapes.get(name) == shape and not any(fates)
        if same and (part != _IN_FLIGHT or self._same_numbering):
            return Kept(name)
        if field == "block":
            return Made((), lambda _: bucket.slots.reshape(-1))
        if field in _ELEMENTWISE:
            return self._elementwise_source(bucket, field, shape)
        found = {
            leaf.path: f"buckets/{self._bucket_of[leaf.path]}/{field}"
            for leaf, why in zip(bucket.leaves, fates, strict=True)
            if not why and leaf.path in self._bucket_of
        }
        cuts = {leaf.path: _blocks(bucket, leaf) for leaf in bucket.leaves}
        found = {
            path: there
            for path, there in found.items()
            if self._buckets[self._bucket_of[path]].blocks[path].geometry == cuts[path].geometry
            and there in self._shapes
            and self._shapes[there][1:] == shape[1:]
            and (part != _IN_FLIGHT or self._same_numbering)
        }

        def make(arrays: Arrays) -> np.ndarray:
            dtype = next((arrays[there].dtype for there in found.values()), np.dtype(np.float32))
            rows = np.full((slots, *shape[1:]), NO_GRADIENT if field == "roots/exponent" else 0, dtype)
            for path, there in found.items():
                rows[cuts[path].slots] = arrays[there][self._buckets[self._bucket_of[path]].blocks[path].slots]
            return rows

        return Made(_unique(found.values()), make)

    def _elementwise_source(self, bucket: Bucket, field: str, shape: tuple[int, ...]) -> Source:
        found = {}
        for leaf in bucket.leaves:
            there = self._elementwise(leaf.path, field)
            why = self._fates[leaf.path].get(_ELEMENTWISE[field], "")
            if there is not None and there[1] == leaf.view.shape and not why:
                found[leaf.path] = there[0]

        def make(arrays: Arrays) -> np.ndarray:
            dtype = next((arrays[there].dtype for there in found.values()), np.dtype(np.float32))
            rows = np.zeros(shape, dtype)
            for leaf in bucket.leaves:
                if leaf.path in found:
                    _blocks(bucket, leaf).cut_into(rows, self._parameter(leaf.path, found[leaf.path], arrays))
            return rows

        return Made(_unique(found.values()), make)


def _blocks(bucket: Bucket, leaf: Leaf) -> _Blocks:
    before = bucket.leaves[: bucket.leaves.index(leaf)]
    first = sum(other.blocks for other in before)
    slots = bucket.slot_of_block[first : first + leaf.blocks]
    return _Blocks(leaf.view, leaf.tiling.pieces, bucket.shape, slots)


def _part(field: str) -> str:
    """What people call the part of the state that a field of a bucket belongs to; "" for its bookkeeping."""
    if field in _ELEMENTWISE:
        return _ELEMENTWISE[field]
    if field.startswith("in_flight/"):
        return _IN_FLIGHT
    if field.startswith("roots/statistics/") or field == "roots/exponent":
        return _STATISTICS
    return "" if field == "block" else _ROOTS


def _checked(entry: Any) -> dict[str, Any]:
    """A bucket of the manifest, every value of the type that it should have."""
    return {
        "shape": [int(length) for length in entry["shape"]],
        "sides": [int(side) for side in entry["sides"]],
        "p": int(entry["p"]),
        **{field: float(entry[field]) for field in ("beta2", "ridge", "cut")},
        "first": int(entry["first"]),
        "phases": int(entry["phases"]),
        "parameters": [
            {
                "path": str(part["path"]),
                "shape": [int(length) for length in part["shape"]],
                "stack": [int(axis) for axis in part["stack"]],
                "sides": [[int(axis) for axis in side] for side in part["sides"]],
                "pieces": [int(count) for count in part["pieces"]],
            }
            for part in entry["parameters"]
        ],
        "slots": [int(slot) for slot in entry["slots"]],
    }


def _numbering(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides which blocks are due when, and what of them is solved."""
    cuts = tuple((tuple(part["shape"]), tuple(part["pieces"])) for part in entry["parameters"])
    return (*(entry[field] for field in ("p", "ridge", "cut", "first", "phases")), tuple(entry["sides"]), cuts)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
