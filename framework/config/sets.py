"""Data sets that a config describes as changes of `config.data`: further held-out sets, and sources of a mixture."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from ..base import durations
from ..base.errors import UserError
from . import overrides
from .components import build, fitting

OWN = "data"  # name of config.data in a mixture
_WEIGHT = "weight"

Stage = tuple[int, tuple[float, ...]]  # first step, and the weight of each source


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources of training examples.

    Attributes:
      sources: those beside `config.data`, by name.
      weights: of each source, by the durations from which they hold; `config.data` has the name "data".
    """

    sources: Mapping[str, Any]
    weights: Mapping[str, Mapping[str, float]]

    def stages(self, in_steps: Callable[[str], int]) -> list[Stage]:
        """Return the stages in order; the weight of `config.data` is the first.

        Raises:
          UserError: a weight is given twice, or all are 0 in a stage.
        """
        changes: dict[int, dict[str, float]] = {}
        for name, by_duration in self.weights.items():
            for duration, weight in by_duration.items():
                if name in changes.setdefault(in_steps(duration), {}):
                    raise UserError(f"config.mixture: {name}.weight@{duration} begins where another weight of it does.")
                changes[in_steps(duration)][name] = weight
        weights, stages = dict.fromkeys((OWN, *self.sources), 1.0), []
        for step in sorted({0, *changes}):
            weights |= changes.get(step, {})
            if not any(weights.values()):
                raise UserError(f"config.mixture: all weights are 0 from step {step} on. Give one that is not.")
            stages.append((step, tuple(weights.values())))
        return stages


def heldout_sets(config: ConfigDict) -> dict[str, Any]:
    """Return the held-out sets of `config.evaluation.sets` and of the sources of the mixture, by name.

    Raises:
      UserError: a name or a change of `config.data` is invalid.
    """
    sets = {name: _built(config, "evaluation.sets", name, own) for name, own in _changes(config, "evaluation.sets")}
    sources = mixture(config).sources
    if same := sets.keys() & sources.keys():
        raise UserError(f"config.evaluation.sets: {min(same)} is also a source of config.mixture. Use another name.")
    return {**sources, **sets}


def mixture(config: ConfigDict) -> Mixture:
    """Return the mixture of `config.mixture`.

    Raises:
      UserError: a name, a weight or a change of `config.data` is invalid.
    """
    sources, weights = {}, {}
    for name, given in _changes(config, "mixture"):
        own, weights[name] = [], {}
        for knob, value in given:
            if knob.partition("@")[0] == _WEIGHT:
                weights[name][_duration(name, knob)] = _weight(name, knob, value)
            else:
                own.append((knob, value))
        if name != OWN:
            sources[name] = _built(config, "mixture", name, own)
        elif own:
            raise UserError(f"config.mixture: data.{own[0][0]}: set config.data.{own[0][0]} in place of it.")
    if weights and not sources:
        raise UserError("config.mixture: has no source beside config.data. Add name.source=SOURCE.")
    return Mixture(sources, weights)


def _changes(config: Any, key: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the knobs and their values by name."""
    changes: dict[str, list[tuple[str, str]]] = {}
    for each in config.evaluation.sets if key == "evaluation.sets" else config[key]:
        name, dot, change = each.partition(".")
        knob, equals, value = change.partition("=")
        if not (dot and name.isidentifier() and equals):
            raise UserError(f"config.{key}: {each!r} is not of the form name.knob=value.")
        changes.setdefault(name, []).append((knob, value))
    return list(changes.items())


def _built(config: Any, key: str, name: str, own: Sequence[tuple[str, str]]) -> Any:
    changed = ConfigDict({"data": config.data.to_dict()}).lock()
    with overrides.about(f"{key}: {name}"):
        overrides.apply(changed, [f"data.{knob}={value}" for knob, value in own])
        return fitting("data", build(changed.data))


def _duration(name: str, knob: str) -> str:
    duration = knob.partition("@")[2] or "0 steps"
    with overrides.about(f"mixture: {name}.{knob}"):
        durations.parse(duration)
    return duration


def _weight(name: str, knob: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < 1e9:
        raise UserError(f"config.mixture: {name}.{knob}={text}: must be a number from 0 on.")
    return weight
