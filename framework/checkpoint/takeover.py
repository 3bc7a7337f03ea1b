"""Decide which arrays a run takes over from a checkpoint and which it initialises, and report it line by line.

The checkpoint's manifest describes its arrays: the parameters by path, and the optimizer's own description of its
state. Mesh, number of processes, model, block sizes and optimizer may have changed since it was saved.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ...optimizers.checkpoint.inheritance import Fresh, Kept, Made, Source
from ...optimizers.plan import patterns
from .. import optimizer
from ..base.errors import UserError
from ..step.state import TrainState
from . import store
from .manifest import Manifest, Parameter
from .origin import Origin
from .record import Record
from .store import AVERAGING, MODEL, OPTIMIZER, PARAMS, Array

_STEP, _ITERATE = "step", f"{AVERAGING}iterate/"  # followed by a path in the variables

Renames = Sequence[tuple[str, str]]


def describe(
    tx: optax.GradientTransformation, name: str, params: Any, treatments: Mapping[str, str], mesh: Mapping[str, int]
) -> dict[str, Any]:
    """Return the manifest of a train state, as JSON.

    Args:
      tx: the optimizer.
      name: its name in the config.
      params: ShapeDtypeStructs with shardings.
      treatments: path of a parameter -> its treatment.
      mesh: axis -> devices.
    """
    parameters = {
        path: Parameter(tuple(leaf.shape), np.dtype(leaf.dtype).name, treatments.get(path, ""))
        for path, leaf in zip(patterns.paths(params), jax.tree.leaves(params), strict=True)
    }
    return Manifest(dict(mesh), jax.process_count(), parameters, name, optimizer.manifest(tx, params)).to_json()


@dataclasses.dataclass(frozen=True)
class Takeover:
    """The source of each array of a train state.

    Attributes:
      path: the checkpoint, None if nothing is taken over.
      spec: the state, ShapeDtypeStructs with shardings, with roots in flight if they may be taken over.
      sources: path of an array in the state -> its source.
      lines: report of everything that is not taken over unchanged.
      whole: number of parameters taken over with all their state.
    """

    path: Path | None
    spec: TrainState
    sources: dict[str, Source]
    lines: tuple[str, ...] = ()
    whole: int = 0

    @property
    def fresh(self) -> frozenset[str]:
        """Paths of the arrays that are initialised."""
        return frozenset(name for name, source in self.sources.items() if isinstance(source, Fresh))

    def state(self, fresh: Mapping[str, jax.Array]) -> TrainState:
        """Return the train state, given the initialised arrays.

        Arrays that are computed from several saved ones pass through the memory of each host.
        """
        like = _by_name(self.spec)
        values: dict[str, Any] = dict(fresh)
        if self.path is not None:
            kept: dict[str, list[str]] = {}
            for name, source in self.sources.items():
                if isinstance(source, Kept):
                    kept.setdefault(source.name, []).append(name)
            arrays = store.read(self.path, {saved: like[names[0]] for saved, names in kept.items()})
            for saved, (first, *others) in kept.items():
                # The step donates each array, so two of them may not share a buffer.
                values |= {first: arrays[saved], **{name: jnp.copy(arrays[saved]) for name in others}}
            for made in self._made():
                saved = store.read(self.path, dict.fromkeys(n for source in made.values() for n in source.names))
                values |= {name: _placed(source.make(saved), like[name]) for name, source in made.items()}
        return jax.tree.unflatten(jax.tree.structure(self.spec), [values[name] for name in like])

    def _made(self) -> Iterator[dict[str, Made]]:
        """Yield the arrays to compute, one bucket of the optimizer at a time."""
        groups: dict[tuple[str, ...], dict[str, Made]] = {}
        for name, source in self.sources.items():
            if isinstance(source, Made):
                groups.setdefault(tuple(name.split("/")[:3]), {})[name] = source
        yield from groups.values()


def plan(
    origin: Origin, abstract: TrainState, tx: optax.GradientTransformation, name: str, renames: Renames
) -> Takeover:
    """Decide what a train state takes over from its origin. Reads the checkpoint's manifest and no array.

    Args:
      origin: the checkpoint.
      abstract: the state, ShapeDtypeStructs with shardings.
      tx: the optimizer.
      name: its name in the config.
      renames: (old, new) paths of parameters, or leading parts of paths.

    Raises:
      UserError: the manifest is damaged, or has no parameter of this model.
    """
    if origin.path is None:
        return Takeover(None, abstract, {path: Fresh("") for path in _by_name(abstract)})
    content, saved = store.manifest(origin.path), store.arrays(origin.path)
    try:
        return _Planner(origin, Manifest.from_json(content), saved, renamer(renames)).plan(abstract, tx, name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the manifest of checkpoint {origin.path} is damaged ({error}); use another one") from error


def optimizer_began(origin: Origin, record: Record, name: str) -> int:
    """Return the number of accepted steps before the optimizer began; above 0 if it replaced another one."""
    if origin.path is None or origin.kind == "init":
        return 0
    if store.manifest(origin.path).get("optimizer") == name:
        return record.optimizer_began
    return record.step - record.skipped


def renamer(renames: Renames) -> Callable[[str], str]:
    """Return a function from old paths to new ones; the first pair that matches decides."""

    def renamed(path: str) -> str:
        for old, new in renames:
            if path == old or path.startswith(f"{old}/"):
                return f"{new}{path[len(old) :]}"
        return path

    return renamed


class _Planner:
    def __init__(self, origin: Origin, manifest: Manifest, saved: Mapping[str, Array], renamed: Callable[[str], str]):
        self._origin, self._manifest, self._saved, self._renamed = origin, manifest, saved, renamed
        self._parameters: dict[str, str] = {}
        for path in manifest.parameters:
            other = self._parameters.setdefault(renamed(path), path)
            if other != path:
                raise UserError(
                    f"{other} and {path} of checkpoint {origin.path} would both be {renamed(path)}. "
                    "Give them two names in config.renamed."
                )

    def plan(self, abstract: TrainState, tx: optax.GradientTransformation, name: str) -> Takeover:
        params, spec = abstract.params, abstract
        of_params = {path: self._parameter(path, leaf) for path, leaf in _by_name(params).items()}
        if not any(isinstance(source, Kept) for source in of_params.values()):
            there, here = ", ".join(list(self._parameters)[:3]), ", ".join(list(of_params)[:3])
            raise UserError(
                f"checkpoint {self._origin.path} has no parameter of this model: it has {there}, ..., the model has "
                f"{here}, .... Use another one, or set config.renamed."
            )
        inheritance = self._inheritance(tx, name, params)
        if inheritance:
            spec = dataclasses.replace(abstract, opt_state=optimizer.saved_spec(tx, abstract.opt_state, params))
        sources, averages = self._sources(spec, of_params, inheritance)
        report = inheritance.report() if inheritance else {}
        changed = {}
        for path, source in of_params.items():
            average = {"average": averages[PARAMS + path]} if PARAMS + path in averages else {}
            changed[path] = _line(source, report.get(path, {}) | average)
        lines = [
            *self._notes(inheritance, name),
            *self._of_average(spec),
            *(f"{path}: {line}" for path, line in changed.items() if line),
            *(f"{path}: initialised ({why})" for path, why in _initialised(sources)),
            *(f"{x}: average initialised ({why})" for x, why in averages.items() if why and x.startswith(MODEL)),
            *(f"{path}: dropped (not in this model)" for path in self._parameters if path not in of_params),
        ]
        return Takeover(self._origin.path, spec, sources, tuple(lines), sum(not line for line in changed.values()))

    def _sources(
        self, spec: TrainState, of_params: Mapping[str, Source], inheritance: optimizer.Inheritance | None
    ) -> tuple[dict[str, Source], dict[str, str]]:
        """Return the source of each array, and for each variable with an average why that is initialised."""
        sources: dict[str, Source] = {}
        averages: dict[str, str] = {}
        init = self._origin.kind == "init"
        for path, leaf in _by_name(spec).items():
            if path.startswith(PARAMS):
                sources[path] = of_params[path.removeprefix(PARAMS)]
            elif path.startswith(MODEL):
                sources[path] = self._model_array(path, leaf)
            elif path.startswith(OPTIMIZER):
                own = path.removeprefix(OPTIMIZER)
                sources[path] = _of_optimizer(inheritance.source(own, leaf.shape)) if inheritance else Fresh("")
            elif path.startswith(_ITERATE):
                own = path.removeprefix(_ITERATE)
                average = own if own.startswith(PARAMS) else f"{MODEL}{own}"
                sources[path], why = self._iterate(sources[average], leaf)
                averages |= {} if init else {average: why}
            else:
                sources[path] = Fresh("") if init else self._array(path, leaf)
        if isinstance(step := sources[_STEP], Fresh) and not init:
            raise ValueError(f"its array {_STEP}: {step.why}")
        return sources, averages

    def _notes(self, inheritance: optimizer.Inheritance | None, name: str) -> list[str]:
        if inheritance:
            return inheritance.notes()
        if self._origin.kind == "init":
            return []
        return [f"the optimizer's state is initialised: saved by {self._manifest.optimizer}, now {name}"]

    def _of_average(self, spec: TrainState) -> list[str]:
        if spec.averaging or self._origin.kind == "init" or not any(name.startswith(_ITERATE) for name in self._saved):
            return []
        return ["the parameters are the average of that run; its iterate is dropped"]

    def _iterate(self, average: Source, leaf: Any) -> tuple[Source, str]:
        """Return the source of an average's iterate, and why the average is initialised, "" if it is taken over."""
        if self._origin.kind == "init":
            return average, ""
        if not isinstance(average, Kept):
            return average, average.why if isinstance(average, Fresh) else ""
        there = self._array(f"{_ITERATE}{average.name.removeprefix(MODEL)}", leaf)
        if isinstance(there, Fresh):
            return average, there.why
        return there, ""

    def _inheritance(self, tx: optax.GradientTransformation, name: str, params: Any) -> optimizer.Inheritance | None:
        if self._origin.kind == "init" or self._manifest.optimizer != name:
            return None
        shapes = {
            path.removeprefix(OPTIMIZER): array.shape
            for path, array in self._saved.items()
            if path.startswith(OPTIMIZER)
        }
        return optimizer.inheritance(tx, params, self._manifest.state, shapes, self._renamed)

    def _parameter(self, path: str, leaf: Any) -> Source:
        return self._array(f"{PARAMS}{self._parameters.get(path, '')}", leaf)

    def _model_array(self, path: str, leaf: Any) -> Source:
        def today(saved: str) -> str:
            collection, _, rest = saved.removeprefix(MODEL).partition("/")
            return f"{MODEL}{collection}/{self._renamed(rest)}"

        found = [saved for saved in self._saved if saved.startswith(MODEL) and today(saved) == path]
        return self._array(found[0], leaf) if found else Fresh("not saved")

    def _array(self, name: str, leaf: Any) -> Source:
        there = self._saved.get(name)
        if there is None:
            return Fresh("not saved")
        if there.shape != leaf.shape:
            return Fresh(f"saved as {there}, now {Array(leaf.shape, leaf.dtype)}")
        return Kept(name)


def _initialised(sources: Mapping[str, Source]) -> Iterator[tuple[str, str]]:
    """Yield the arrays that belong to no parameter and are initialised, each with the reason."""
    for path, source in sources.items():
        if isinstance(source, Fresh) and source.why and not path.startswith((PARAMS, OPTIMIZER, _ITERATE)):
            yield path, source.why


def _of_optimizer(source: Source) -> Source:
    """Return a source in the optimizer's state as one in the train state."""
    if isinstance(source, Kept):
        return Kept(f"{OPTIMIZER}{source.name}")
    if isinstance(source, Made):
        names = tuple(f"{OPTIMIZER}{name}" for name in source.names)
        return Made(names, lambda arrays: source.make({name: arrays[f"{OPTIMIZER}{name}"] for name in source.names}))
    return source


def _line(source: Source, fate: Mapping[str, str]) -> str:
    """Return the report on a parameter and its state; "" if all of it is taken over."""
    parts = {"parameter": source.why if isinstance(source, Fresh) else ""} | dict(fate)
    taken = [part for part, why in parts.items() if not why]
    fresh: dict[str, list[str]] = {}
    for part, why in parts.items():
        if why:
            fresh.setdefault(why, []).append(part)
    if not fresh:
        return ""
    told = [f"{', '.join(taken)} taken over"] if taken else []
    return "; ".join([*told, *(f"{', '.join(names)} initialised ({why})" for why, names in fresh.items())])


def _by_name(tree: Any) -> dict[str, Any]:
    return dict(zip(patterns.paths(tree), jax.tree.leaves(tree), strict=True))


def _placed(value: np.ndarray, like: Any) -> jax.Array:
    value = np.asarray(value, like.dtype)
    if value.shape != like.shape:
        raise AssertionError(f"made an array of shape {value.shape} for one of {like.shape}")
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index])
