"""Load, check and compare the configs of runs."""

import json
import math
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from ..base import durations, values
from ..base.bounds import Within
from ..base.errors import UserError
from . import files, overrides
from .components import build, component, is_component
from .overrides import flat
from .schema import BOUNDS, MAY_CHANGE, TYPES, get_config
from .sets import heldout_sets

_SHOWN_DIFFERENCES = 5
_COMPONENTS = ("task", "data", "optimizer")
# The numbers that devices can hold, and the smallest above 0 that no device rounds to 0.
_INT32, _FLOAT32, _SMALLEST = Within(-(2**31) + 1, 2**31 - 1), Within(-3.4e38, 3.4e38), 1.18e-38


def load(spec: str, changes: Sequence[str] = (), allowed: Sequence[str] = ()) -> Any:
    """Return the locked and checked ConfigDict of a file, with `changes` applied.

    Args:
      spec: FILE.py or FILE.py:VARIANT; see `files.run`.
      changes: "batch_size=32", "optimizer.name=package.module:Class"; see `overrides.apply`.
      allowed: keys, or changes of them, that may differ from the workdir's config: added to `may_change`.

    Raises:
      UserError: the file or a change is invalid. The message has the place and the fix.
    """
    config: Any = files.run(spec).lock()
    overrides.apply(config, [*changes, *(each for each in allowed if "=" in each)])
    keys = [each.partition("=")[0] for each in allowed]
    sections = flat(config), flat(config, whole=lambda _: True)
    known = {name for section in sections for name, _ in section}
    if strange := [key for key in keys if key not in known]:
        raise UserError(overrides.unknown_key(strange[0], known))
    config.may_change = (*config.may_change, *keys)
    check(config)
    return config


def check(config: ConfigDict) -> None:
    """Raise UserError if a knob is missing, unknown, of another type than declared or out of range.

    Devices compute in int32 and float32: no number of a config may be too large for these, or become 0 in float32.
    Builds each component once, to find the values that its class refuses.
    """
    for key in _COMPONENTS:
        if not is_component(config.get(key)):
            raise UserError(f"config.{key} is not the section of a component. Set it with base.component(...).")
    declared, given = (dict(flat(side, whole=is_component)) for side in (get_config(), config))
    for key in given:
        if key not in declared:
            raise UserError(overrides.unknown_key(key, declared))
    for key, default in declared.items():
        if key not in given:
            raise UserError(f"config.{key} is missing. Let get_config start from base.get_config().")
        value = given[key]
        if key in _COMPONENTS:
            for field, number in value.items():
                _check_numbers(f"{key}.{field}", number)
            with overrides.about(key):
                build(value)
            continue
        hint = TYPES.get(key, type(default))
        try:
            values.convert(value, hint)
        except TypeError:
            raise UserError(overrides.mistyped(key, value, hint)) from None
        if isinstance(default, str) and durations.is_duration(default):
            with overrides.about(key):
                durations.parse(value, whole_run=key == "duration")
        if key == "schedule.begin" and value != "auto":
            with overrides.about(key):
                durations.parse(value)
        _check_numbers(key, value, BOUNDS.get(key))
        if key == "evaluation.batches" and value == 0:
            raise UserError(f"config.{key}=0: no batch to evaluate. Use -1 for all batches, or at least 1.")
    heldout_sets(config)


def to_json(config: ConfigDict) -> str:
    """Return the config as JSON for the workdir: references resolved, keys sorted, tuples as lists."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def may_change(config: Any) -> tuple[str, ...]:
    """Return the keys and sections of a config that may differ from the workdir's when a run resumes."""
    return (*MAY_CHANGE, *config.may_change)


def differences(stored: dict[str, Any], config: Any, ignored: Sequence[str]) -> list[str]:
    """Return the differences of a config from an earlier one, one line a key: "batch_size: 16 -> 32".

    Args:
      stored: the earlier config, read from the JSON of `to_json`.
      config: the config of this run.
      ignored: keys and sections that may differ.
    """
    sections = {key: component(config[key].name).to_dict() for key in _COMPONENTS if config.get(key)}
    defaults = ConfigDict(get_config().to_dict() | sections)
    old, new, default = (dict(flat(side)) for side in (stored, *(json.loads(to_json(c)) for c in (config, defaults))))
    # A knob that the earlier config lacks was declared later: that run did what is the default now.
    old = {key: value for key, value in default.items() if key in new} | old
    # A component of another class has other fields; its name alone is the difference.
    switched = [key.removesuffix("name") for key in old if key.endswith(".name") and old[key] != new.get(key, old[key])]
    if new.get("schedule.begin") == "auto":  # the earlier start has decided
        new["schedule.begin"] = old.get("schedule.begin", "auto")
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
    keys = " ".join(f"--change {line.partition(':')[0]}" for line in changed)
    return (
        f"{path} belongs to another config ({shown}{more}). Use another --workdir, restore the old values, "
        f"or train on with the new ones: add {keys}"
    )


def _check_numbers(key: str, value: Any, within: Within | None = None) -> None:
    if isinstance(value, tuple):
        for item in value:
            _check_numbers(key, item)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if isinstance(value, float) and 0 < abs(value) < _SMALLEST:
        raise UserError(f"config.{key}={value!r}: is 0 in float32. Use 0, or at least {_SMALLEST}.")
    device = _INT32 if isinstance(value, int) else _FLOAT32
    for bound in (within, device) if within is None or within.most == math.inf else (within,):
        if bound is not None and not bound.least <= value <= bound.most:
            raise UserError(f"config.{key}={value!r}: must be {bound}.")
