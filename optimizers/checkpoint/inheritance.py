"""Take over a saved state of Distributed Shampoo on other devices, with another model or with other options.

The manifest of a saved state identifies a block by the path of its parameter and its coordinates. Statistics and roots
can therefore be moved to any number of devices, and to models with added or removed parameters. Momenta and second
moments are elementwise, and can be moved to blocks of another size too.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..diagonal import Rule
from ..options import Options
from ..plan.blocks import Bucket, DiagonalLeaf, Leaf, Plan
from ..plan.patterns import state_key
from ..preconditioners import PRECONDITIONERS
from ..preconditioners.base import NO_GRADIENT
from .manifest import (
    AGE,
    ELEMENTWISE,
    MOMENTUM,
    SECOND_MOMENT,
    Blocks,
    SavedBlocks,
    describe_bucket,
)

Arrays = Mapping[str, np.ndarray]

_STATISTICS, _ROOTS, _IN_FLIGHT = "statistics", "roots", "roots in flight"


class Kept(NamedTuple):
    """A saved array, by name, taken over unchanged."""

    name: str


class Made(NamedTuple):
    """An array that `make` computes from saved arrays by name."""

    names: tuple[str, ...]
    make: Callable[[Arrays], np.ndarray]


class Fresh(NamedTuple):
    """An array that must be initialised, and why, because nothing usable was saved."""

    why: str


Source = Kept | Made | Fresh


def placed(source: Source, prefix: str) -> Source:
    """Return the source with a prefix before the names of saved arrays."""
    if isinstance(source, Kept):
        return Kept(f"{prefix}{source.name}")
    if isinstance(source, Made):
        names = {name: f"{prefix}{name}" for name in source.names}
        return Made(
            tuple(names.values()), lambda arrays: source.make({name: arrays[names[name]] for name in source.names})
        )
    return source


class Inheritance:
    """Sources of the arrays of a new state in a saved state.

    Args:
      plan: plan of the new state.
      options: options of the new state.
      manifest: result of `describe` for the saved state.
      shapes: name -> shape of the saved arrays; names are paths in the state joined by slashes.
      renamed: maps a saved parameter's path to its present path.

    Raises:
      ValueError: the manifest is invalid.
    """

    def __init__(
        self,
        plan: Plan,
        options: Options,
        manifest: Any,
        shapes: Mapping[str, tuple[int, ...]],
        renamed: Callable[[str], str] = lambda path: path,
    ):
        self._plan, self._options, self._shapes = plan, options, shapes
        self._saved = SavedBlocks.read(manifest, shapes, renamed)
        self._fates = {leaf.path: self._fate(bucket, leaf) for bucket in plan.buckets for leaf in bucket.leaves} | {
            leaf.path: self._diagonal_fate(leaf) for leaf in plan.diagonal.values()
        }

    def source(self, name: str, shape: tuple[int, ...]) -> Source:
        """Return the source of the array `name` of the new state."""
        kind, _, rest = name.partition("/")
        if kind == "buckets":
            bucket_name, _, field = rest.partition("/")
            return self._bucket_source(next(b for b in self._plan.buckets if b.name == bucket_name), field, shape)
        if kind == "diagonal":
            key, _, field = rest.partition("/")
            path = next(leaf.path for leaf in self._plan.diagonal.values() if state_key(leaf.path) == key)
            return self._diagonal_source(path, f"moments/{field}", shape)
        return Kept(name) if self._shapes.get(name) == shape else Fresh("not saved")

    def report(self) -> dict[str, dict[str, str]]:
        """Return path of a parameter -> part of its state -> "" if it is taken over, else the reason."""
        return self._fates

    def notes(self) -> list[str]:
        """Return further lines for the user."""
        flying = [name for name in self._shapes if "/in_flight/" in name]
        if flying and not (self._options.refresh == "host" and self._same_numbering):
            return ["roots in flight on the host are dropped; their blocks are refreshed when they are due"]
        return []

    @property
    def _same_numbering(self) -> bool:
        """Return whether every block is due on the same steps as in the saved state."""
        mine = [(b.name, _numbering(describe_bucket(b), [x.path for x in b.leaves])) for b in self._plan.buckets]
        return mine == [(name, _numbering(b.entry, b.blocks)) for name, b in self._saved.buckets.items()]

    def _fate(self, bucket: Bucket, leaf: Leaf) -> dict[str, str]:
        grafts, adapts = bucket.preconditioner.grafts, bucket.preconditioner.adapts
        roots = self._roots_fate(bucket, leaf)
        # The second moment in a preconditioner's basis belongs to its roots.
        other = roots[_ROOTS] if adapts else ""
        moments = self._moments_fate(
            leaf.path, leaf.view.shape, bucket.beta2, self._options.of_graft, grafts=grafts, other=other
        )
        return moments | roots

    def _roots_fate(self, bucket: Bucket, leaf: Leaf) -> dict[str, str]:
        if not bucket.sides:
            return {}
        saved, mine = self._saved.blocks.get(leaf.path), Blocks.of(bucket, leaf)
        if saved is None:
            return {_STATISTICS: "not saved", _ROOTS: "not saved"}
        fate = {_STATISTICS: ""}
        entry, own = self._saved.buckets[saved.bucket].entry, describe_bucket(bucket)
        if saved.geometry != mine.geometry:
            there, here = ("x".join(map(str, blocks.shape)) for blocks in (saved, mine))
            fate[_STATISTICS] = f"blocks of {there} there, {here} here"
            if there == here:
                fate[_STATISTICS] = "blocks are cut differently"
        elif entry["sides"] != own["sides"]:
            fate[_STATISTICS] = f"sides {entry['sides']} there, {own['sides']} here"
        elif PRECONDITIONERS[entry["preconditioner"]].statistics != bucket.preconditioner.statistics:
            fate[_STATISTICS] = f"{entry['preconditioner']} there, {bucket.preconditioner.name} here"
        elif (entry["beta2"] == 1) != (bucket.beta2 == 1):
            fate[_STATISTICS] = "a sum and an average differ"
        fate[_ROOTS] = fate[_STATISTICS] or next(
            (
                f"{field} {entry[field]} there, {own[field]} here"
                for field in ("preconditioner", "p", "ridge", "cut")
                if entry[field] != own[field]
            ),
            "",
        )
        return fate

    def _moments_fate(
        self,
        path: str,
        shape: tuple[int, ...],
        beta2: float,
        rule: Rule,
        *,
        grafts: bool = True,
        other: str = "",
    ) -> dict[str, str]:
        """Return the fate of momentum and, with `grafts`, second moment: if one is initialised, so is the other.

        `other` is the reason why a second moment in the preconditioner's basis is initialised, or "".
        """
        saved, fate = self._saved, {}
        if rule.beta1:
            kind = f"{saved.momentum} there, {rule.momentum} here" if saved.momentum != rule.momentum else ""
            fate["momentum"] = self._elementwise_fate(path, MOMENTUM, shape) or kind
        if rule.method.has_second_moment and grafts:
            why = self._elementwise_fate(path, SECOND_MOMENT, shape)
            if not why and (method := self._method(path)) != rule.name:
                why = f"{method} there, {rule.name} here"
            elif not why and (self._beta2(path) == 1) != (beta2 == 1):
                why = "a sum and an average differ"
            fate["second moment"] = why
        why = next((why for why in (*fate.values(), other) if why), "")
        return {name: own or why for name, own in fate.items()}

    def _diagonal_fate(self, leaf: DiagonalLeaf) -> dict[str, str]:
        """Return the fate of a diagonal parameter's moments; row-wise ones are sums for any method and beta2."""
        if leaf.by_row:
            return {"second moment": self._elementwise_fate(leaf.path, SECOND_MOMENT, leaf.shape[:-1])}
        return self._moments_fate(leaf.path, leaf.shape, leaf.beta2, self._options.of_diagonal)

    def _elementwise_fate(self, path: str, field: str, shape: tuple[int, ...]) -> str:
        found = self._elementwise(path, field)
        if found is None:
            return "not saved"
        return "" if found[1] == shape else f"of shape {list(found[1])} there, {list(shape)} here"

    def _method(self, path: str) -> str:
        return self._saved.graft if path in self._saved.blocks else self._saved.diagonal[path][2]

    def _beta2(self, path: str) -> float:
        saved = self._saved.blocks.get(path)
        return self._saved.buckets[saved.bucket].entry["beta2"] if saved else self._saved.diagonal[path][1]

    def _elementwise(self, path: str, field: str) -> tuple[str, tuple[int, ...]] | None:
        """Return (name of the saved array with a parameter's momentum or second moment, shape of the parameter)."""
        name, saved = self._array(path, field), self._saved.blocks.get(path)
        if name not in self._shapes:
            return None
        return name, saved.view.shape if saved else self._shapes[name]

    def _array(self, path: str, field: str) -> str:
        """Return the name of the saved array with a field of `Moments` of a parameter; "" if it is not saved."""
        if path in self._saved.blocks:
            return f"buckets/{self._saved.blocks[path].bucket}/{field}"
        if path in self._saved.diagonal:
            return f"{self._saved.diagonal[path][0]}{field.partition('/')[2]}"
        return ""

    def _parameter(self, path: str, name: str, arrays: Arrays) -> np.ndarray:
        saved = self._saved.blocks.get(path)
        return saved.joined(arrays[name]) if saved else arrays[name]

    def _ages(self, paths: Iterable[str]) -> dict[str, tuple[str, int | None]]:
        """Return path -> (name of the saved array with the age of the moments, its index) if they are taken over."""
        found: dict[str, tuple[str, int | None]] = {}
        for path in paths:
            name, saved = self._array(path, AGE), self._saved.blocks.get(path)
            if name in self._shapes and not any(self._fates[path].get(part) for part in ELEMENTWISE.values()):
                found[path] = name, int(saved.slots[0]) if saved else None
        return found

    def _age_source(self, slots: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> Source:
        """Return the source of ages [slots], or of a scalar, given the slots of each parameter."""
        found = self._ages(slots)

        def make(arrays: Arrays) -> np.ndarray:
            ages = np.zeros(shape, np.int32)
            for path, (name, index) in found.items():
                ages[slots[path] if shape else ()] = arrays[name] if index is None else arrays[name][index]
            return ages

        return Made(_unique(name for name, _ in found.values()), make)

    def _diagonal_source(self, path: str, field: str, shape: tuple[int, ...]) -> Source:
        if field == AGE:
            return self._age_source({path: np.zeros(0, np.int64)}, shape)
        why, found = self._fates[path][ELEMENTWISE[field]], self._elementwise(path, field)
        if why or found is None:
            return Fresh(why)
        name, _ = found
        if path not in self._saved.blocks:
            return Kept(name)
        return Made((name,), lambda arrays: self._parameter(path, name, arrays).reshape(shape))

    def _bucket_source(self, bucket: Bucket, field: str, shape: tuple[int, ...]) -> Source:
        name, slots = f"buckets/{bucket.name}/{field}", len(bucket.slots.reshape(-1))
        part = _part(field)
        parts = ELEMENTWISE.values() if field == AGE else [part]
        fates = ["".join(self._fates[leaf.path].get(part, "") for part in parts) for leaf in bucket.leaves]
        saved = self._saved.buckets.get(bucket.name)
        unchanged = saved is not None and describe_bucket(bucket) == dict(saved.entry)
        same = unchanged and self._shapes.get(name) == shape and not any(fates)
        if same and (part != _IN_FLIGHT or self._same_numbering):
            return Kept(name)
        if field == "block":
            return Made((), lambda _: bucket.slots.reshape(-1))
        if field == AGE:
            return self._age_source({leaf.path: Blocks.of(bucket, leaf).slots for leaf in bucket.leaves}, shape)
        if field in ELEMENTWISE:
            return self._elementwise_source(bucket, field, shape)
        cuts = {leaf.path: Blocks.of(bucket, leaf) for leaf in bucket.leaves}
        # parameter -> (the saved array, the parameter's slots in it)
        found: dict[str, tuple[str, np.ndarray]] = {}
        for path, why in zip(cuts, fates, strict=True):
            there = self._saved.blocks.get(path)
            if why or there is None or there.geometry != cuts[path].geometry:
                continue
            array = f"buckets/{there.bucket}/{field}"
            like = self._shapes.get(array)
            if like and like[1:] == shape[1:] and (part != _IN_FLIGHT or self._same_numbering):
                found[path] = array, there.slots

        def make(arrays: Arrays) -> np.ndarray:
            dtype = next((arrays[array].dtype for array, _ in found.values()), np.dtype(np.float32))
            rows = np.full((slots, *shape[1:]), NO_GRADIENT if field == "roots/scale_log2" else 0, dtype)
            for path, (array, there) in found.items():
                rows[cuts[path].slots] = arrays[array][there]
            return rows

        return Made(_unique(array for array, _ in found.values()), make)

    def _elementwise_source(self, bucket: Bucket, field: str, shape: tuple[int, ...]) -> Source:
        found = {}
        for leaf in bucket.leaves:
            there = self._elementwise(leaf.path, field)
            why = self._fates[leaf.path].get(ELEMENTWISE[field], "")
            if there is not None and there[1] == leaf.view.shape and not why:
                found[leaf.path] = there[0]

        def make(arrays: Arrays) -> np.ndarray:
            dtype = next((arrays[there].dtype for there in found.values()), np.dtype(np.float32))
            rows = np.zeros(shape, dtype)
            for leaf in bucket.leaves:
                if leaf.path in found:
                    Blocks.of(bucket, leaf).cut_into(rows, self._parameter(leaf.path, found[leaf.path], arrays))
            return rows

        return Made(_unique(found.values()), make)


def _part(field: str) -> str:
    """Return the part of the state, as named in reports, that a field of a bucket belongs to; "" for `block`."""
    if field in ELEMENTWISE:
        return ELEMENTWISE[field]
    if field.startswith("in_flight/"):
        return _IN_FLIGHT
    if field.startswith("roots/statistics/") or field in ("roots/scale_log2", "roots/age"):
        return _STATISTICS
    return "" if field in ("block", AGE) else _ROOTS


def _numbering(entry: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Return the entries of a bucket that determine when each block is due and how it is solved."""
    parameters = [dict(part) | {"path": path} for part, path in zip(entry["parameters"], paths, strict=True)]
    return dict(entry) | {"parameters": parameters, "beta2": None, "slots": None}


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
