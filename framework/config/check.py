"""Load, check and compare the configs of runs."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from ..base import durations, values
from ..base.errors import UserError
from ..base.json_files import parse_object
from . import files, overrides
from .components import build, is_component
from .overrides import flat
from .schema import MAY_CHANGE, TYPES, get_config

_SHOWN_DIFFERENCES = 5
_COMPONENTS = ("task", "data", "optimizer")


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in choices), f"one of {', '.join(choices)}"


# Values that have the declared type and still make no sense: key -> (whether a value is valid, the rule).
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda seed: 0 <= seed < 2**32, "from 0 to 2**32 - 1"),
    "ema_decay": (lambda decay: 0 <= decay < 1, "at least 0 (off) and below 1, for example 0.999"),
    "gradient_clip": (lambda norm: 0 <= norm < math.inf, "at least 0 (off) and finite"),
    "schedule.learning_rate": (lambda rate: 0 <= rate < math.inf, "at least 0 and finite"),
    "evaluation.batches": (lambda count: count == -1 or count > 0, "-1 (all) or above 0"),
    "checkpoint.keep_last": (lambda count: count >= 1, "at least 1, to resume from"),
    "checkpoint.keep_best": (lambda count: count >= 0, "at least 0"),
    "evaluation.best_mode": _one_of("min", "max"),
    "checkpoint.on_error": _one_of("stop", "continue"),
    "guard.max_consecutive_skips": (lambda count: count >= 1, "at least 1"),
    "guard.on_spike": _one_of("ignore", "skip", "rollback"),
    "guard.max_rollbacks": (lambda count: count >= 0, "at least 0"),
    "guard.spike_factor": (lambda factor: factor > 0, "above 0"),
    "guard.spike_window": (lambda steps: steps >= 2, "at least 2"),
    "watchdog_seconds": (lambda seconds: seconds >= 0, "at least 0 (off)"),
    "compilation_cache.gigabytes": (lambda size: size > 0, "above 0"),
    "processes.death_seconds": (lambda seconds: seconds >= 5, "at least 5"),
}


def load(spec: str, changes: Sequence[str] = ()) -> Any:
    """Return the locked and checked ConfigDict of a file, with `changes` applied.

    Args:
      spec: FILE.py or FILE.py:VARIANT; see `files.run`.
      changes: "batch_size=32", "optimizer.name=package.module:Class"; see `overrides.apply`.

    Raises:
      UserError: the file or a change is invalid. The message has the place and the fix.
    """
    config = files.run(spec).lock()
    for key in _COMPONENTS:
        _check_section(key, config.get(key))
    overrides.apply(config, changes)
    check(config)
    return config


def check(config: ConfigDict) -> None:
    """Raise UserError if a knob is missing, unknown, of another type than declared or out of range.

    Builds each component once, to find the values that its class refuses.
    """
    declared, given = (dict(flat(side, whole=is_component)) for side in (get_config(), config))
    for key in given:
        if key not in declared:
            raise UserError(overrides.unknown_key(key, declared))
    for key, default in declared.items():
        if key not in given:
            raise UserError(f"config.{key} is missing. Let get_config start from base.get_config().")
        value = given[key]
        if key in _COMPONENTS:
            _check_section(key, value)
            with overrides.about(key):
                build(value)
            continue
        try:
            values.convert(value, TYPES.get(key, type(default)))
        except TypeError:
            raise UserError(overrides.mistyped(key, value, TYPES.get(key, type(default)))) from None
        if isinstance(default, str) and durations.is_duration(default):
            # The units are arbitrary: this only parses. The length of the run itself cannot be a percentage.
            units = durations.Units(1, 1, 1, total_steps=None if key == "duration" else 1)
            with overrides.about(key):
                durations.to_steps(value, units)
        valid, rule = _RULES.get(key, (lambda _: True, ""))
        if not valid(value):
            raise UserError(f"config.{key}={value!r}: must be {rule}.")


def to_json(config: ConfigDict) -> str:
    """Return the config as JSON for the workdir: references resolved, keys sorted, tuples as lists."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def may_change(config: Any) -> tuple[str, ...]:
    """Return the keys and sections of a config that may differ from the workdir's when a run resumes."""
    return (*MAY_CHANGE, *config.may_change)


def differences(old_json: str, config: ConfigDict, ignored: Sequence[str]) -> list[str]:
    """Return the differences of a config from an earlier one, one line a key: "batch_size: 16 -> 32".

    Args:
      old_json: text from `to_json`.
      config: the config of this run.
      ignored: keys and sections that may differ.

    Raises:
      UserError: the earlier config is damaged.
    """
    stored = parse_object(old_json)
    if stored is None:
        raise UserError("the workdir's config is not a JSON object. Restore it or use another workdir.")
    old, new = (dict(flat(side)) for side in (stored, json.loads(to_json(config))))
    # A component of another class has other fields; its name alone is the difference.
    switched = [key.removesuffix("name") for key in old if key.endswith(".name") and old[key] != new.get(key, old[key])]
    lines = []
    for key in sorted(old | new):
        if any(key == prefix or key.startswith(f"{prefix}.") for prefix in ignored):
            continue
        if any(key.startswith(section) and key != f"{section}name" for section in switched):
            continue
        before, after = (json.dumps(side[key]) if key in side else "absent" for side in (old, new))
        if before != after:
            lines.append(f"{key}: {before} -> {after}")
    return lines


def foreign(path: Any, changed: Sequence[str]) -> str:
    """Return the error message for a workdir of another config, from the lines of `differences`."""
    shown = ", ".join(changed[:_SHOWN_DIFFERENCES])
    more = f" and {len(changed) - _SHOWN_DIFFERENCES} more" if len(changed) > _SHOWN_DIFFERENCES else ""
    keys = ",".join(line.partition(":")[0] for line in changed)
    return (
        f"{path} belongs to another config ({shown}{more}). Use another --workdir, restore the old values, "
        f"or allow the change with --config.may_change={keys}."
    )


def _check_section(key: str, section: Any) -> None:
    if not is_component(section):
        raise UserError(f"config.{key} is not the section of a component. Set it with base.component(...).")
