"""Decide which arrays a run takes over from a checkpoint and which it initialises, and report it line by line.

The checkpoint's manifest describes its arrays: the parameters by path, and the optimizer's own description of its
state. Mesh, number of processes, model, block sizes and optimizer may have changed since it was saved.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ...optimizers.checkpoint.inheritance import Fresh, Kept, Made, Source, placed
from .. import optimizer
from ..base.errors import UserError
from ..base.model_folder import is_folder
from ..base.paths import Path
from ..step.state import TrainState
from . import store
from .folders import Folder
from .origin import Origin
from .record import Record
from .store import AVERAGING, FROZEN, MODEL, OPTIMIZER, PARAMS, Array

_ITERATE = f"{AVERAGING}iterate/"  # followed by a path in the variables
_RENAMABLE = re.compile(rf"({PARAMS}|{FROZEN}|{MODEL}[^/]+/|{_ITERATE}[^/]+/)(.+)")

Renames = Sequence[tuple[str, str]]


def describe(tx: optax.GradientTransformation, name: str, params: Any, mesh: Mapping[str, int]) -> dict[str, Any]:
    """Return the manifest of a train state, as JSON.

    Args:
      tx: the optimizer.
      name: its name in the config.
      params: ShapeDtypeStructs with shardings.
      mesh: axis -> devices.
    """
    treatments = optimizer.treatments(tx, params)
    parameters = {
        path: {"shape": [*leaf.shape], "dtype": np.dtype(leaf.dtype).name, "treatment": treatments.get(path, "")}
        for path, leaf in store.by_name(params).items()
    }
    return {
        "format": store.FORMAT,
        "mesh": dict(mesh),
        "processes": jax.process_count(),
        "parameters": parameters,
        "optimizer": name,
        "state": optimizer.manifest(tx, params),
    }


@dataclasses.dataclass(frozen=True)
class Takeover:
    """The source of each array of a train state.

    Attributes:
      path: the checkpoint, None if nothing is taken over.
      spec: the state, ShapeDtypeStructs with shardings, with roots in flight if they may be taken over.
      sources: path of an array in the state -> its source.
      lines: report of everything that is not taken over unchanged.
      whole: number of parameters taken over with all their state.
      folder: the Hugging Face folder that `path` is, None for a checkpoint.
    """

    path: Path | None
    spec: TrainState
    sources: dict[str, Source]
    lines: tuple[str, ...] = ()
    whole: int = 0
    folder: Folder | None = None

    @property
    def fresh(self) -> frozenset[str]:
        """Paths of the arrays that are initialised."""
        return frozenset(name for name, source in self.sources.items() if isinstance(source, Fresh))

    def state(self, fresh: Mapping[str, jax.Array]) -> TrainState:
        """Return the train state, given the initialised arrays.

        Arrays that are computed from several saved ones pass through the memory of each host.
        """
        like = store.by_name(self.spec)
        values: dict[str, Any] = dict(fresh)
        if self.path is not None:
            kept: dict[str, list[str]] = {}
            for name, source in self.sources.items():
                if isinstance(source, Kept):
                    kept.setdefault(source.name, []).append(name)
            wanted = {saved: like[names[0]] for saved, names in kept.items()}
            arrays = self.folder.read(wanted) if self.folder else store.read(self.path, wanted)
            for saved, (first, *others) in kept.items():
                # The step donates each array, so two of them may not share a buffer.
                values |= {first: arrays[saved], **{name: jnp.copy(arrays[saved]) for name in others}}
            made = [(name, source) for name, source in self.sources.items() if isinstance(source, Made)]
            # One bucket of the optimizer at a time, to limit the memory.
            for _, bucket in itertools.groupby(made, key=lambda item: item[0].split("/")[:3]):
                group = dict(bucket)
                arrays = store.read(self.path, dict.fromkeys(n for source in group.values() for n in source.names))
                values |= {name: _placed(source.make(arrays), like[name]) for name, source in group.items()}
        return jax.tree.unflatten(jax.tree.structure(self.spec), [values[name] for name in like])


def plan(
    origin: Origin,
    abstract: TrainState,
    tx: optax.GradientTransformation,
    name: str,
    renames: Renames,
    task: Any = None,
) -> Takeover:
    """Decide what a train state takes over from its origin. Reads the checkpoint's manifest and no array.

    Args:
      origin: the checkpoint.
      abstract: the state, ShapeDtypeStructs with shardings.
      tx: the optimizer.
      name: its name in the config.
      renames: (old, new) paths of parameters, or leading parts of paths.
      task: the model; needed if the origin is a Hugging Face folder.

    Raises:
      UserError: the manifest is damaged, the checkpoint has no parameter of this model, or a Hugging Face folder is not
        of this model.
    """
    if origin.path is None:
        return Takeover(None, abstract, dict.fromkeys(store.by_name(abstract), Fresh("")))
    folder = Folder.open(origin.path, task) if is_folder(origin.path) else None
    manifest = {} if folder else store.manifest(origin.path)
    saved = folder.arrays() if folder else store.arrays(origin.path)
    renamed = functools.partial(_renamed, renames)
    names = _present_names(origin.path, saved, renamed)
    frozen = [path for path in store.by_name(abstract) if path.startswith(FROZEN) and path not in names]
    # Parameters that the run freezes may come from one that trained them.
    bases = {path: f"{PARAMS}{path.removeprefix(FROZEN)}" for path in frozen}
    names |= {path: names.pop(base) for path, base in bases.items() if base in names}
    spec, inheritance = abstract, None
    try:
        if origin.kind != "init" and manifest["optimizer"] == name:
            shapes = {x.removeprefix(OPTIMIZER): saved[x].shape for x in saved if x.startswith(OPTIMIZER)}
            inheritance = optimizer.Inheritance(tx, abstract.params, manifest["state"], shapes, renamed)
            spec = dataclasses.replace(abstract, opt_state=optimizer.saved_spec(abstract.opt_state, abstract.params))
        sources = _sources(origin, spec, saved, names, inheritance)
        notes = inheritance.notes() if inheritance else []
        if not inheritance and origin.kind != "init":
            notes = [f"the optimizer's state is initialised: saved by {manifest['optimizer']}, now {name}"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"the manifest of checkpoint {origin.path} is damaged ({error}); use another one") from error
    if origin.kind != "init" and not spec.averaging and any(x.startswith(_ITERATE) for x in saved):
        notes.append("the parameters are the average of that run; its iterate is dropped")
    if origin.kind != "init" and any(x.startswith(_ITERATE) and x not in names for x in sources):
        notes.append("the average starts at the parameters, as far as the checkpoint has none")
    fates = inheritance.report() if inheritance else {}
    lines = {
        path: _line(source, fates.get(path.removeprefix(PARAMS), {}))
        for path, source in sources.items()
        if path.startswith(PARAMS)
    }
    others = [path for path in sources if not path.startswith((PARAMS, OPTIMIZER, _ITERATE))]
    report = (
        *notes,
        *(f"{path.removeprefix(PARAMS)}: {line}" for path, line in lines.items() if line),
        *(f"{path}: initialised ({why})" for path in others if (why := _why(sources[path]))),
        *(
            f"{path.removeprefix(PARAMS)}: dropped (not in this model)"
            for path in names
            if path.startswith(PARAMS) and path not in lines
        ),
    )
    return Takeover(origin.path, spec, sources, report, sum(not line for line in lines.values()), folder)


def optimizer_began(origin: Origin, record: Record, name: str) -> int:
    """Return the number of accepted steps before the optimizer began; above 0 if it replaced another one."""
    if origin.path is None or origin.kind == "init":
        return 0
    if store.manifest(origin.path).get("optimizer") == name:
        return record.optimizer_began
    return record.step - record.skipped


def continuing(origin: Origin, options: Any, name: str) -> Any:
    """Return the optimizer's options with what they take over from a checkpoint of the same optimizer."""
    if origin.path is None or origin.kind == "init" or not hasattr(options, "continuing"):
        return options
    manifest = store.manifest(origin.path)
    states = manifest.get("state", {}).values() if manifest.get("optimizer") == name else ()
    for state in states:
        options = options.continuing(state)
    return options


def _renamed(renames: Renames, path: str) -> str:
    for old, new in renames:
        if path == old or path.startswith(f"{old}/"):
            return f"{new}{path[len(old) :]}"
    return path


def _present_names(path: Path, saved: Iterable[str], renamed: Callable[[str], str]) -> dict[str, str]:
    """Return the present name of each saved array -> the saved name. The optimizer renames its own."""
    names: dict[str, str] = {}
    for name in saved:
        match = _RENAMABLE.fullmatch(name)
        present = f"{match[1]}{renamed(match[2])}" if match else name
        if (other := names.setdefault(present, name)) != name:
            first, second, both = (text.removeprefix(PARAMS) for text in (other, name, present))
            raise UserError(
                f"{first} and {second} of checkpoint {path} would both be {both}. Give them two names in "
                "config.renamed."
            )
    return names


def _sources(
    origin: Origin,
    spec: TrainState,
    saved: Mapping[str, Array],
    names: Mapping[str, str],
    inheritance: optimizer.Inheritance | None,
) -> dict[str, Source]:
    """Return the source of each array."""
    sources: dict[str, Source] = {}
    for path, leaf in store.by_name(spec).items():
        there = saved.get(names.get(path, ""))
        if path.startswith(OPTIMIZER):
            own = path.removeprefix(OPTIMIZER)
            sources[path] = placed(inheritance.source(own, leaf.shape), OPTIMIZER) if inheritance else Fresh("")
        elif origin.kind == "init" and not path.startswith((PARAMS, FROZEN, MODEL, _ITERATE)):
            sources[path] = Fresh("")
        elif there is None:
            sources[path] = Fresh("not saved")
        elif there.shape != leaf.shape:
            sources[path] = Fresh(f"saved as {there}, now {Array(leaf.shape, leaf.dtype)}")
        else:
            sources[path] = Kept(names[path])
        if path.startswith(_ITERATE) and (origin.kind == "init" or isinstance(sources[path], Fresh)):
            own = path.removeprefix(_ITERATE)
            sources[path] = sources[own if own.startswith(PARAMS) else f"{MODEL}{own}"]
    if not any(isinstance(source, Kept) for path, source in sources.items() if path.startswith((PARAMS, FROZEN))):
        there, here = (
            ", ".join([x.removeprefix(PARAMS) for x in side if x.startswith(PARAMS)][:3]) for side in (names, sources)
        )
        raise UserError(
            f"checkpoint {origin.path} has no parameter of this model: it has {there}, ..., the model has {here}, .... "
            "Use another one, or set config.renamed."
        )
    if origin.kind != "init" and (why := _why(sources["step"])):
        raise ValueError(f"its array step: {why}")
    return sources


def _why(source: Source) -> str:
    """Return why an array is initialised, "" if it is taken over."""
    return source.why if isinstance(source, Fresh) else ""


def _line(source: Source, fate: Mapping[str, str]) -> str:
    """Return the report on a parameter and its state; "" if all of it is taken over."""
    by_reason: dict[str, list[str]] = {"": []}
    for part, why in {"parameter": _why(source), **fate}.items():
        by_reason.setdefault(why, []).append(part)
    taken = by_reason.pop("")
    if not by_reason:
        return ""
    fresh = [f"{', '.join(parts)} initialised ({why})" for why, parts in by_reason.items()]
    return "; ".join([f"{', '.join(taken)} taken over", *fresh] if taken else fresh)


def _placed(value: np.ndarray, like: Any) -> jax.Array:
    value = np.asarray(value, like.dtype)
    if value.shape != like.shape:
        raise AssertionError(f"made an array of shape {value.shape} for one of {like.shape}")
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index])
