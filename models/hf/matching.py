"""Match the options of a task with the families: a config.json and tensors that have all of them."""

import dataclasses
import math
from typing import Any

from ..decoder.options import DecoderOptions
from . import families, peft
from .families import Config, Knobs
from .tensors import Tensors


def tensors(config: Config, given: Knobs) -> dict[str, Tensors]:
    """Return path of each parameter -> its tensors in a folder with this config.json, for a task with these knobs.

    Raises:
      ValueError: the model of the folder is not this task.
    """
    needed = _needed(config)
    if unlike := families.differences(needed, given):
        raise ValueError(f"its model needs {_told(unlike)}")
    return families.tensors(needed, config["model_type"])


def adapter_tensors(config: Config, adapter: Config, given: Knobs) -> dict[str, Tensors]:
    """Return path of each parameter of adapters -> its tensors in a PEFT folder, for a task with these knobs.

    Args:
      config: config.json of the base.
      adapter: adapter_config.json.
      given: the knobs.

    Raises:
      ValueError: the adapters of the folder are not this task's.
    """
    needed = peft.knobs(adapter, config["model_type"])
    if any({*_listed(value)} != {*_listed(given[knob])} for knob, value in needed.items()):
        raise ValueError(f"its adapter needs {', '.join(f'task.{knob}={value!r}' for knob, value in needed.items())}")
    return peft.tensors(given, config["model_type"])


def config(given: Knobs, model_type: str = "") -> dict[str, Any]:
    """Return a config.json for a task with these knobs, of the first family that fits or of the one given.

    Raises:
      ValueError: no family has all these knobs.
    """
    others: list[tuple[float, str]] = []
    if model_type not in ("", *families.FAMILIES):
        raise ValueError(f"--family={model_type}: use one of {', '.join(families.FAMILIES)}")
    for name in (model_type,) if model_type else families.FAMILIES:
        found = families.config(given, name)
        try:
            unlike = families.differences(_needed(found), given)
        except ValueError as error:
            others.append((math.inf, f"{name}: {error}"))  # sizes that this family cannot have
            continue
        if not unlike:
            return found
        others.append((len(unlike), f"{name}: {_told(unlike)}"))
    raise ValueError(f"no family of Hugging Face models has these knobs; the nearest would be {min(others)[1]}")


def _needed(config: Config) -> Knobs:
    return dataclasses.asdict(DecoderOptions(**families.knobs(config)))


def _listed(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _told(unlike: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"task.{knob}={value!r} (now {given!r})" for knob, (value, given) in unlike.items())
