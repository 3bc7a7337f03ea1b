"""Configs as the trainer takes them: loaded from a file, overridden, checked, and compared with an earlier run's."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from .. import optimizer
from ..base import durations, values
from ..base.errors import UserError
from ..base.json_files import parse_object
from ..step.averaging import AveragingOptions
from . import files, overrides
from .components import build, is_component
from .schema import get_config

_SHOWN_DIFFERENCES = 5
_RULES = Sequence[tuple[str, str | Sequence[str] | None]]


def load(spec: str, changes: Sequence[str] = ()) -> Any:
    """The locked ConfigDict of a file with some of its knobs changed, checked.

    Args:
      spec: FILE.py or FILE.py:VARIANT; see `config_files.run`.
      changes: "batch_size=32", "optimizer.name=package.module:Class"; see `overrides.apply`.

    Raises:
      UserError: anything at all is wrong with either; the message has the place and the fix.
    """
    config = files.run(spec).lock()
    for key in ("task", "data", "optimizer"):
        if key not in config or not is_component(config[key]):
            raise UserError(f"{spec}: config.{key} is not the section of a component; set it by base.component(...)")
    overrides.apply(config, changes)
    check(config)
    return config


def check(config: ConfigDict) -> None:
    """Refuse a config that lacks a knob, has one too many, or holds a value of another type than the declared.

    Components are built once, so that what they refuse is refused here.

    Raises:
      UserError: naming the key.
    """
    declared = dict(_knobs(get_config()))
    given, built = dict(_knobs(config)), {}
    for key in given:
        if key not in declared:
            raise UserError(overrides.unknown_key(key, declared))
    for key, default in declared.items():
        if key not in given:
            raise UserError(f"config.{key} is missing; let get_config start from base.get_config()")
        if is_component(default):
            built[key] = _build(key, given[key])
        else:
            _check_value(key, given[key], default)
    _check_ranges(config)
    _check_averaging(config, built["optimizer"])


def to_json(config: ConfigDict) -> str:
    """The config as text for the workdir: references resolved, keys sorted, tuples as lists."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def differences(old_json: str, config: ConfigDict, may_change: Sequence[str]) -> list[str]:
    """How a config differs from an earlier one: "batch_size: 16 -> 32", one line for each key.

    Args:
      old_json: what `to_json` once returned.
      config: of now.
      may_change: keys and sections whose changes do not count.

    Raises:
      UserError: the earlier config is damaged.
    """
    stored = parse_object(old_json)
    if stored is None:
        raise UserError("the workdir's config is no JSON object; restore it or use another workdir")
    old, new = (dict(overrides.flat(side)) for side in (stored, json.loads(to_json(config))))
    switched = [key.removesuffix("name") for key in old if key.endswith(".name") and old[key] != new.get(key, old[key])]
    lines = []
    for key in sorted(old | new):
        if any(key == prefix or key.startswith(f"{prefix}.") for prefix in may_change):
            continue
        if any(key.startswith(section) and key != f"{section}name" for section in switched):
            continue  # another class has other fields; that it is another says it all
        before, after = (json.dumps(side[key]) if key in side else "absent" for side in (old, new))
        if before != after:
            lines.append(f"{key}: {before} -> {after}")
    return lines


def foreign(path: Any, changed: Sequence[str]) -> str:
    """The message for a workdir that belongs to another config, from the lines of `differences`."""
    shown = ", ".join(changed[:_SHOWN_DIFFERENCES])
    more = f" and {len(changed) - _SHOWN_DIFFERENCES} more" if len(changed) > _SHOWN_DIFFERENCES else ""
    return (
        f"{path} belongs to another config ({shown}{more}); use another --workdir, restore the old values, "
        "or add these keys to config.may_change"
    )


def _knobs(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted keys; a component is one value."""
    for key, value in config.items():
        if isinstance(value, ConfigDict) and not is_component(value):
            yield from _knobs(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_ranges(config: Any) -> None:
    """Numbers that have the right type and no sense."""
    on_error = ("stop", "continue")
    checkpoint, batches, skips = config.checkpoint, config.evaluation.batches, config.guard.max_consecutive_skips
    on_spike, factor, window = config.guard.on_spike, config.guard.spike_factor, config.guard.spike_window
    death, cached = config.processes.death_seconds, config.compilation_cache.gigabytes
    clip, rate = config.gradient_clip, config.schedule.learning_rate
    for key, value, fine, wanted in (
        ("seed", config.seed, 0 <= config.seed < 2**32, "from 0 to 2**32 - 1"),
        ("gradient_clip", clip, 0 <= clip < math.inf, "at least 0, which is off, and finite"),
        ("schedule.learning_rate", rate, 0 <= rate < math.inf, "at least 0, and finite"),
        ("evaluation.batches", batches, batches == -1 or batches > 0, "-1 (all) or above 0"),
        ("checkpoint.keep_last", checkpoint.keep_last, checkpoint.keep_last >= 1, "at least 1, to resume from"),
        ("checkpoint.keep_best", checkpoint.keep_best, checkpoint.keep_best >= 0, "at least 0"),
        ("checkpoint.on_error", repr(checkpoint.on_error), checkpoint.on_error in on_error, f"one of {on_error}"),
        ("guard.max_consecutive_skips", skips, skips >= 1, "at least 1"),
        ("guard.on_spike", on_spike, on_spike in ("ignore", "skip", "rollback"), "ignore, skip or rollback"),
        ("guard.max_rollbacks", config.guard.max_rollbacks, config.guard.max_rollbacks >= 0, "at least 0"),
        ("guard.spike_factor", factor, factor > 0, "above 0"),
        ("guard.spike_window", window, window >= 2, "at least 2"),
        ("watchdog_seconds", config.watchdog_seconds, config.watchdog_seconds >= 0, "at least 0, which is off"),
        ("compilation_cache.gigabytes", cached, cached > 0, "above 0"),
        ("processes.death_seconds", death, death >= 5, "at least 5"),
    ):
        if not fine:
            raise UserError(f"config.{key} is {value}; it must be {wanted}")
    _check_type("sharding_rules", config.sharding_rules, _RULES)


def _check_averaging(config: Any, options: Any) -> None:
    """Whether the average goes with the schedule and the optimizer of these options."""
    momenta = optimizer.momentum_decays(options)
    try:
        AveragingOptions(**config.averaging).refuse(config.schedule.decay, momenta)
    except ValueError as error:
        raise UserError(f"config.{error}") from error


def _build(key: str, section: Any) -> Any:
    if not is_component(section):
        raise UserError(f"config.{key} is not the section of a component; set it by base.component(...)")
    try:
        return build(section)
    except UserError as error:
        raise UserError(f"config.{key}: {error}") from error


def _check_type(key: str, value: Any, hint: Any) -> None:
    try:
        values.convert(value, hint)
    except TypeError:
        raise UserError(f"config.{key}: expected {values.describe(hint)}, given {value!r}") from None


def _check_value(key: str, value: Any, default: Any) -> None:
    _check_type(key, value, type(default))
    if isinstance(default, str) and durations.is_duration(default):
        # Any units do: this finds what is no duration. The run itself has no length to be a part of.
        units = durations.Units(1, 1, 1, total_steps=None if key == "duration" else 1)
        try:
            durations.to_steps(value, units)
        except UserError as error:
            raise UserError(f"config.{key}: {error}") from error
